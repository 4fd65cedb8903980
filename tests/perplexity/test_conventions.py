"""Each convention against a straightforward loop over the tokens, with a model that can be read.

The loops are written from the tools' own descriptions and share nothing with the package but the
tokens and the model.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import pytest

from tests.perplexity.bigram import IDENTITY, Bigram
from tests.perplexity.texts import PROSE, byte_level, byte_level_with_bos
from vllm.score.data import as_source
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import PerplexityResult, Settings, prepare
from vllm.score.perplexity.conventions import (
    ALIASES,
    CONVENTIONS,
    LM_EVAL_HF,
    LM_EVAL_VLLM,
    canonical,
    longest_prompt,
    longest_window,
    resolve,
)
from vllm.score.perplexity.metrics import EXACT, GUIDE_CURRENT, GUIDE_UNTIL_2024
from vllm.score.perplexity.run import score_job

DOCUMENTS = [PROSE[:9000], "", PROSE[20_000:20_700], "x", PROSE[30_000:33_000]]
JOINED = "\n\n".join(DOCUMENTS)
CONTEXT, STRIDE = 96, 40
TOKENIZERS = {"without BOS": byte_level, "with BOS": byte_level_with_bos}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture
def model(tokenizer: Any) -> Bigram:
    return Bigram(len(tokenizer))


def run(tokenizer: Any, model: Bigram, *names: str, **options: Any) -> PerplexityResult:
    source = as_source(options.pop("source", DOCUMENTS))
    sizes = {"context_length": CONTEXT, "stride": STRIDE, "group_tokens": 1000, **options}
    job = prepare(Settings(conventions=names, **sizes), source, tokenizer)
    return score_job(job, model.score, IDENTITY, use_tqdm=False)


def mean_loss(losses: list[float]) -> float:
    return math.fsum(losses) / len(losses)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)  # the scores are float32


def guide_windows(model: Bigram, ids: list[int]) -> list[tuple[int, list[float]]]:
    """(trg_len, losses) of each window of Hugging Face's guide."""
    windows, previous_end = [], 0
    for begin in range(0, len(ids), STRIDE):
        end = min(begin + CONTEXT, len(ids))
        target_length = end - previous_end
        window = ids[begin:end]
        labels = [-100] * (len(window) - target_length) + window[-target_length:]
        losses = [
            -model.logprob(window[: i + 1], labels[i + 1])
            for i in range(len(window) - 1)
            if labels[i + 1] != -100
        ]
        windows.append((target_length, losses))
        previous_end = end
        if end == len(ids):
            break
    return windows


def test_hf_stride(tokenizer: Any, model: Bigram) -> None:
    windows = guide_windows(model, tokenizer(JOINED)["input_ids"])
    # The guide: outputs.loss is the mean over labels, its weight is trg_len - 1.
    total = sum(mean_loss(losses) * (length - 1) for length, losses in windows)
    literal = math.exp(total / sum(length - 1 for length, _ in windows))
    plain = math.exp(mean_loss([mean_loss(losses) for _, losses in windows]))
    exact = math.exp(mean_loss([loss for _, losses in windows for loss in losses]))

    result = run(tokenizer, model, "hf-stride")
    name = "token_perplexity"
    assert result.figure(name, "hf-stride", GUIDE_CURRENT).value == close(literal)
    assert result.figure(name, "hf-stride", GUIDE_UNTIL_2024).value == close(plain)
    assert result.figure(name, "hf-stride", EXACT).value == close(exact)
    assert result.perplexity == close(exact)
    assert literal != exact != plain
    assert result.figure(name, "hf-stride", EXACT).standard_error is not None
    assert result.figure(name, "hf-stride", GUIDE_CURRENT).standard_error is None
    # All of it was known from the run's own windows.
    assert len(model.prompts) == len(windows)


def test_hf_stride_without_overlap_is_exact(tokenizer: Any, model: Bigram) -> None:
    result = run(tokenizer, model, "hf-stride", stride=CONTEXT)
    name = "token_perplexity"
    exact = result.figure(name, "hf-stride", EXACT).value
    assert result.figure(name, "hf-stride", GUIDE_CURRENT).value == pytest.approx(exact, rel=1e-12)
    assert any("stride equals context_length" in note for note in result.notes)


def test_gptq(tokenizer: Any, model: Bigram) -> None:
    ids, size = tokenizer(JOINED)["input_ids"], 128
    samples = len(ids) // size
    nlls = []
    for i in range(samples):
        row = ids[i * size : (i + 1) * size]
        losses = [-model.logprob(row[:j], row[j]) for j in range(1, size)]
        nlls.append(mean_loss(losses) * size)
    expected = math.exp(sum(nlls) / (samples * size))

    figure = run(tokenizer, model, "gptq:128").figure("token_perplexity", "gptq:128")
    assert figure.value == close(expected)
    assert figure.provenance.windows == samples
    assert figure.provenance.scored_tokens == samples * (size - 1)


def test_llama_cpp(tokenizer: Any, model: Bigram) -> None:
    tokens, n_ctx = tokenizer(JOINED)["input_ids"], 64
    bos = tokens[0] if tokenizer is byte_level_with_bos() else None
    losses, first = [], n_ctx // 2
    for i in range(len(tokens) // n_ctx):
        chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
        seen = chunk if bos is None else [bos, *chunk[1:]]
        # process_logits: n_ctx - 1 - first rows from `first` on, each against the next token
        losses += [
            -model.logprob(seen[: first + k + 1], chunk[first + k + 1])
            for k in range(n_ctx - 1 - first)
        ]

    figure = run(tokenizer, model, "llama.cpp:64").figure("token_perplexity", "llama.cpp:64")
    assert figure.value == close(math.exp(mean_loss(losses)))
    assert figure.provenance.scored_tokens == len(losses)
    place = "in the place of each window's first" if bos is not None else "none"
    assert place in figure.provenance.bos


@pytest.mark.parametrize("exact_end", [False, True])
def test_exllamav3(tokenizer: Any, model: Bigram, exact_end: bool) -> None:
    ids, size = tokenizer(JOINED, add_special_tokens=False)["input_ids"], 32
    options = {}
    if exact_end:
        ids = ids[: 20 * size]
        options["source"] = ids
    rows = [ids[a : a + size] for a in range(0, len(ids) - size, size)][:100]
    losses = [-model.logprob(row[:j], row[j]) for row in rows for j in range(1, size)]

    figure = run(tokenizer, model, "exllamav3:32", **options).figure("nll", "exllamav3:32")
    assert figure.value == close(mean_loss(losses))
    assert figure.provenance.windows == len(rows) == (19 if exact_end else 100)
    assert figure.provenance.bos == "none"


def test_a_document_that_begins_with_the_prefix_token_gets_no_other() -> None:
    """lm-eval's rule; its own models are asked in tests/integrations/test_lm_eval_perplexity.py."""
    tokenizer = byte_level_with_bos()
    model = Bigram(len(tokenizer))
    bos = tokenizer.bos_token_id
    for name, empty in (("lm-eval-hf", [bos]), ("lm-eval-vllm", [])):
        texts = ["", "x", "<|bos|>x", " <|bos|>x"]
        result = run(tokenizer, model, name, source=texts, separator=None)
        figure = result.figure("nll", name)
        expected = [empty, [bos, *tokenizer("x", add_special_tokens=False)["input_ids"]]]
        expected += [tokenizer("<|bos|>x", add_special_tokens=False)["input_ids"]]
        expected += [tokenizer(" <|bos|>x")["input_ids"]]
        losses = [
            -model.logprob([bos, *ids][: i + 1], token)
            for ids in expected
            for i, token in enumerate(ids)
        ]
        assert figure.value == close(mean_loss(losses))
        assert figure.provenance.scored_tokens == len(losses)
        assert figure.provenance.bytes == len("".join(texts).encode())
        bos_text = f"token {bos} in front of each document, token {bos} at its start, scored"
        assert figure.provenance.bos == bos_text


def test_the_run_itself(tokenizer: Any, model: Bigram) -> None:
    ids = tokenizer(JOINED)["input_ids"]
    losses = [loss for _, window in guide_windows(model, ids) for loss in window]
    text = JOINED
    if tokenizer is byte_level():  # the first token is not scored
        text = JOINED[len(tokenizer.decode([ids[0]])) :]
    result = run(tokenizer, model)
    provenance = result.provenance
    assert result.nll == close(mean_loss(losses))
    assert provenance.scored_tokens == len(losses)
    assert provenance.words == len(re.split(r"\s+", text))
    assert provenance.bytes == len(text.encode())
    assert result.figure("word_perplexity").value == close(
        math.exp(math.fsum(losses) / len(re.split(r"\s+", text)))
    )
    assert result.figure("bits_per_token").value == close(mean_loss(losses) / math.log(2))


def test_all_conventions_at_once_equal_each_alone(tokenizer: Any, model: Bigram) -> None:
    names = ["hf-stride", "gptq:96", "llama.cpp:96", "exllamav3:96", LM_EVAL_HF, LM_EVAL_VLLM]
    together = run(tokenizer, model, *names)
    for name in names:
        alone = run(tokenizer, Bigram(model.size), name)
        found = [f for f in together.figures if f.convention == name]
        assert found == [f for f in alone.figures if f.convention == name]
        assert found


def test_what_is_known_is_not_scored_again() -> None:
    # Without a BOS llama.cpp's windows of 96 are every other of the run's, whose last 48 tokens
    # were scored; llama.cpp wants 47 of them.
    tokenizer = byte_level()
    model = Bigram(len(tokenizer))
    run(tokenizer, model, stride=48)
    own = len(model.prompts)
    model.prompts.clear()
    run(tokenizer, model, "llama.cpp:96", stride=48)
    assert len(model.prompts) == own
    # The rows of ExLlamaV3 are the first of GPTQ's.
    model.prompts.clear()
    result = run(tokenizer, model, "gptq:96", "exllamav3:96", stride=48)
    rows = result.figure("nll", "gptq:96").provenance.windows
    prompts = [tuple(prompt) for prompt, _ in model.prompts]
    assert len(prompts) == own + rows - 1  # the run's first window scored all a row asks for


def test_a_bos_before_every_window() -> None:
    tokenizer = byte_level()
    model = Bigram(len(tokenizer))
    ids, bos = tokenizer(JOINED)["input_ids"], tokenizer.bos_token_id
    losses = []
    for begin in range(0, len(ids), CONTEXT - 1):
        seen = [bos, *ids[begin : begin + CONTEXT - 1]]
        losses += [-model.logprob(seen[:i], seen[i]) for i in range(1, len(seen))]

    result = run(tokenizer, model, bos="window", stride=CONTEXT)
    assert result.nll == close(mean_loss(losses))
    assert result.provenance.scored_tokens == len(ids)
    assert result.provenance.bos == f"token {bos} in front of every window"


def test_a_bos_at_the_start() -> None:
    tokenizer = byte_level()
    model = Bigram(len(tokenizer))
    ids = [tokenizer.bos_token_id, *tokenizer(JOINED)["input_ids"]]
    losses = [loss for _, window in guide_windows(model, ids) for loss in window]
    result = run(tokenizer, model, bos="start")
    assert result.nll == close(mean_loss(losses))
    assert result.provenance.bytes == len(JOINED.encode())
    assert result.provenance.text_sha256 == hashlib.sha256(JOINED.encode()).hexdigest()


def test_documents_on_their_own() -> None:
    tokenizer = byte_level()
    model = Bigram(len(tokenizer))
    result = run(tokenizer, model, separator=None, bos="start")
    losses = []
    for document in DOCUMENTS:
        ids = [tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]
        losses += [loss for _, window in guide_windows(model, ids) for loss in window]
    assert result.nll == close(mean_loss(losses))
    assert result.provenance.documents == "each alone"


def test_token_ids_are_taken_as_they_are() -> None:
    tokenizer = byte_level_with_bos()
    model = Bigram(len(tokenizer))
    ids = tokenizer(JOINED)["input_ids"]
    from_ids = run(tokenizer, model, "gptq:128", source=ids)
    from_text = run(tokenizer, model, "gptq:128")
    assert from_ids.nll == from_text.nll
    assert from_ids.figure("nll", "gptq:128").value == from_text.figure("nll", "gptq:128").value
    assert from_ids.provenance.bytes is None
    assert {f.name for f in from_ids.figures if f.convention == "run"} == {
        "nll",
        "token_perplexity",
        "bits_per_token",
    }


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ScoreModeError, match=r"'lama\.cpp' is unknown \(did you mean 'llama\.cpp'"):
        resolve("lama.cpp", byte_level(), context_length=8, stride=4)
    with pytest.raises(ScoreModeError, match="there are hf-stride, gptq"):
        resolve("zzzzzz", byte_level(), context_length=8, stride=4)
    for size in ("x", "", "2", "-5"):
        with pytest.raises(ScoreModeError, match="window size"):
            resolve(f"gptq:{size}", byte_level(), context_length=8, stride=4)


def test_names_and_sizes() -> None:
    found = resolve("all", byte_level(), context_length=300, stride=4)
    assert [r.label for r in found] == list(CONVENTIONS)
    assert [r.context_length for r in found] == [300, 2048, 512, 2048, 300, 300]
    twice = resolve(["gptq", "gptq:2048"], byte_level(), context_length=300, stride=4)
    assert [r.label for r in twice] == ["gptq"]
    sizes = resolve(["hf-stride", "hf-stride:96"], byte_level(), context_length=300, stride=4)
    assert [r.label for r in sizes] == ["hf-stride", "hf-stride:96"]
    assert longest_prompt((), 300) == longest_prompt("lm-eval-vllm", 300) == 300
    assert longest_prompt(["llama.cpp", "gptq:4096"], 300) == 4096
    assert longest_prompt("lm-eval-hf", 300) == longest_window("lm-eval-hf", 300) + 1 == 301


def test_short_names_stand_for_one_version_of_a_tool() -> None:
    for alias, name in ALIASES.items():
        assert name in CONVENTIONS and alias not in CONVENTIONS
        (found,) = resolve([f"{alias}:64", f"{name}:64"], byte_level(), context_length=8, stride=4)
        assert found.label == f"{name}:64" == canonical(f"{alias}:64")
    model = Bigram(len(byte_level()))
    result = run(byte_level(), model, "lm-eval-rolling")
    assert result.figure("nll", "lm-eval-rolling") is result.figure("nll", LM_EVAL_HF)


def test_a_tokenizer_without_special_tokens() -> None:
    class Bare:
        is_fast = False

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return list(map(ord, text))

    with pytest.raises(ScoreModeError, match="has neither"):
        resolve("lm-eval-rolling", Bare(), context_length=8, stride=4)
    with pytest.raises(ScoreModeError, match=r"context_length is 2, .* 'lm-eval-0\.4\.13-vllm:3'"):
        resolve("lm-eval-vllm", byte_level(), context_length=2, stride=1)


def test_every_convention_says_where_it_comes_from() -> None:
    for convention in CONVENTIONS.values():
        assert convention.faults and convention.plan.__doc__


def test_a_text_too_short_for_a_row_is_an_error(tokenizer: Any, model: Bigram) -> None:
    with pytest.raises(ScoreModeError, match="need at least 2048"):
        run(tokenizer, model, "gptq", source="short text")
