"""Hugging Face's sampling under our settings: whose policy it is, padding, and what it leaves."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.helpers import random_prompts
from tests.processor.character_models import EOS, bigram_model, character_tokenizer
from tests.processor.teacher_forced import generate
from vllm.score.errors import ScoreModeError
from vllm.score.processor import SequenceProcessor
from vllm.score.processor.backends import HuggingFaceBackend
from vllm.score.processor.config import GenerationConfig, Precision
from vllm.score.processor.results import Wanted, step_values
from vllm.score.processor.sequences import prompt_ids

LETTERS = "abcdefg"
SIZE = len(LETTERS) + 1
END = SIZE - 1
TEMPERATURE, TOP_P = 0.7, 0.8


@cache
def letters() -> Any:
    return character_tokenizer(LETTERS)


def bigrams(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return bigram_model(torch.randn(SIZE, SIZE, generator=generator) * 1.5)


def attending(seed: int = 0) -> Any:
    """One layer with attention: every token depends on all before it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                fan_in = 8.0 if weight is model.lm_head.weight else weight.shape[1]
                weight.normal_(0, fan_in**-0.5, generator=generator)
    return model


def float64_softmax(model: Any, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """The distribution of a float64 model behind the ids, [V]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    assert logits.dtype == torch.float64
    return (logits / temperature).softmax(0).numpy()


def nucleus_of(p: np.ndarray, top_p: float) -> np.ndarray:
    order = np.argsort(-p)
    sums = np.cumsum(p[order])
    assert abs(sums - top_p).min() > 1e-4 or top_p == 1, "no case for a test: at the boundary"
    kept = order if top_p == 1 else order[: int((sums < top_p).sum()) + 1]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


def config(**fields: Any) -> GenerationConfig:
    defaults = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_new_tokens": 3}
    return GenerationConfig(**(defaults | fields))


def fits(counts: Counter, expected: dict[Any, float]) -> bool:
    """Pearson's test; outcomes expected less than five times are put together."""
    assert set(counts) <= set(expected), "something of probability 0 was drawn"
    total = sum(counts.values())
    large = [key for key, q in expected.items() if q * total >= 5]
    found = [counts[key] for key in large]
    wanted = [expected[key] * total for key in large]
    if total - sum(wanted) > 1e-6 * total:
        found.append(total - sum(found))
        wanted.append(total - sum(wanted))
    return len(found) == 1 or chisquare(found, wanted).pvalue > 1e-4


@pytest.mark.parametrize("own_settings", [False, True])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.7, 0.6)])
def test_first_tokens_are_drawn_from_q(
    temperature: float, top_p: float, own_settings: bool
) -> None:
    model = bigrams()
    if own_settings:
        own = model.generation_config
        own.do_sample, own.top_k, own.repetition_penalty = True, 2, 2.0
        own.temperature, own.min_p, own.suppress_tokens = 0.1, 0.3, [1, 2]
        own.min_new_tokens, own.no_repeat_ngram_size, own.max_length = 2, 1, 5
    before = copy.deepcopy(model.generation_config)
    for letter in (0, 3):
        settings = config(temperature=temperature, top_p=top_p, max_new_tokens=1)
        [group] = generate(model, letters(), [[letter]], 4000, settings, batch_size=4000, seed=1)
        exact = copy.deepcopy(model).double()
        q = nucleus_of(float64_softmax(exact, [letter], temperature), top_p)
        assert all(len(ids) == 1 for ids in group)
        expected = {token: q[token] for token in np.flatnonzero(q)}
        assert fits(Counter(ids[0] for ids in group), expected)
    assert model.generation_config == before


def all_sequences(model: Any, prompt: list[int], new: int) -> dict[tuple[int, ...], np.ndarray]:
    """(p, q) of every response that q can give."""
    found = {}
    growing = {(): np.ones(2)}
    for step in range(1, new + 1):
        longer = {}
        for ids, weights in growing.items():
            p = float64_softmax(model, [*prompt, *ids])
            q = nucleus_of(float64_softmax(model, [*prompt, *ids], TEMPERATURE), TOP_P)
            for token in np.flatnonzero(q):
                pair = weights * (p[token], q[token])
                ended = token == END or step == new
                (found if ended else longer)[(*ids, int(token))] = pair
        growing = longer
    return found


def test_whole_sequences_weighted_by_p_over_q() -> None:
    """E_q[prod p/q] is what p gives to the responses that q can give."""
    model, prompt = attending(seed=2), [2, 5]
    possible = all_sequences(copy.deepcopy(model).double(), prompt, 3)
    assert sum(q for _, q in possible.values()) == pytest.approx(1)
    supported = sum(p for p, _ in possible.values())
    assert supported < 0.9 and any(len(ids) < 3 for ids in possible)
    [group] = generate(model, letters(), [prompt], 4000, config(), batch_size=1000, seed=0)
    counts = Counter(map(tuple, group))
    assert fits(counts, {ids: q for ids, (_, q) in possible.items()})

    weights = []
    for ids, count in counts.items():
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        wanted = Wanted(GenerationConfig(TEMPERATURE, TOP_P), diagnostics=False)
        values = step_values(logits, torch.tensor(ids), wanted)
        p, q = possible[ids]
        assert values["logprob"].sum().item() == pytest.approx(math.log(p), abs=1e-4)
        assert values["logq"].sum().item() == pytest.approx(math.log(q), abs=1e-4)
        weights += [math.exp((values["logprob"] - values["logq"]).sum().item())] * count
    error = np.std(weights) / math.sqrt(len(weights))
    assert abs(np.mean(weights) - supported) < 4 * error


def test_greedy() -> None:
    model = attending()
    exact = copy.deepcopy(model).double()
    prompts = [[0], [1, 2], [6, 6, 3]]
    found = generate(model, letters(), prompts, 2, config(do_sample=False), batch_size=4)
    for prompt, group in zip(prompts, found, strict=True):
        ids: list[int] = []
        while len(ids) < 3 and END not in ids:
            ids.append(int(float64_softmax(exact, [*prompt, *ids]).argmax()))
        assert group == [ids, ids]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_ragged_prompts_answer_as_alone(architecture: str, model_dir: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_dir(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = random_prompts([1, 17, 40, 2], 1000, seed=3)
    settings = config(do_sample=False, max_new_tokens=8)
    together = generate(model, tokenizer, prompts, 1, settings, batch_size=3)
    for prompt, group in zip(prompts, together, strict=True):
        assert generate(model, tokenizer, [prompt], 1, settings, batch_size=1) == [group]
        ids = list(prompt)
        for token in group[0]:
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_seeds() -> None:
    model = bigrams()

    def draw(seed: int | None, batch_size: int = 50) -> list[list[list[int]]]:
        return generate(
            model, letters(), ["a", "bc"], 20, config(), batch_size=batch_size, seed=seed
        )

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(7)
    assert draw(7) == first and draw(8) != first
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay"
    from_state = draw(None)
    assert draw(None) != from_state
    torch.set_rng_state(state)
    assert draw(None) == from_state
    assert [len(group) for group in draw(1, batch_size=7)] == [20, 20]


def test_the_model_is_left_as_it_was() -> None:
    model = attending().train()
    model.model.layers[0].mlp.eval()
    own = model.generation_config

    def run() -> None:
        modes = [module.training for module in model.modules()]
        try:
            generate(model, letters(), ["ab"], 2, config(), batch_size=8)
        finally:
            assert [module.training for module in model.modules()] == modes
            assert model.generation_config is own
            assert all(
                weight.requires_grad and weight.grad is None for weight in model.parameters()
            )

    run()
    model.lm_head = torch.nn.Linear(3, SIZE)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run()


def test_dropout_is_off() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": SIZE, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}
    dropout = {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attn_pdrop": 0.9}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, **dropout, bos_token_id=None, eos_token_id=END, initializer_range=1.0)
    ).train()
    [group] = generate(
        model, letters(), ["abc"], 20, config(do_sample=False, max_new_tokens=20), batch_size=20
    )
    assert len(set(map(tuple, group))) == 1


def test_peft_keeps_its_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    plain = attending()
    settings = config(do_sample=False, max_new_tokens=20)
    prompts = list(LETTERS)
    without = generate(plain, letters(), prompts, 1, settings, batch_size=8)
    torch.manual_seed(0)
    adapted = get_peft_model(
        attending(), LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"])
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    own = adapted.generation_config
    own.top_k, own.suppress_tokens = 1, [0, 1, 2, 3]
    found = generate(adapted, letters(), prompts, 1, settings, batch_size=8)
    assert adapted.generation_config is own
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert found == generate(merged, letters(), prompts, 1, settings, batch_size=8)
    assert found != without
    assert list(HuggingFaceBackend(adapted, letters(), Precision()).eos_token_ids) == [END]


def test_ddp_is_unwrapped() -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    started = not distributed.is_initialized()
    if started:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = attending()
        wrapped = DistributedDataParallel(model)
        for given in (wrapped, model):
            assert HuggingFaceBackend(given, letters(), Precision()).target is model
        settings = config(do_sample=False)
        assert generate(wrapped, letters(), ["a"], 1, settings, batch_size=1) == generate(
            model, letters(), ["a"], 1, settings, batch_size=1
        )
    finally:
        if started:
            distributed.destroy_process_group()


def test_every_end_of_sequence_token_ends() -> None:
    logits = torch.zeros(SIZE, SIZE)
    for first, second in itertools.pairwise([0, 1, 2, 3]):
        logits[first, second] = 60.0
    model = bigram_model(logits)
    model.generation_config.eos_token_id = [2, 6]
    settings = config(do_sample=False)
    assert generate(model, letters(), [[0]], 1, settings, batch_size=1) == [[[1, 2]]]
    tokenizer = copy.deepcopy(letters())
    tokenizer.eos_token = None
    assert generate(model, tokenizer, [[0]], 1, settings, batch_size=1) == [[[1, 2]]]
    model.generation_config.eos_token_id = None
    with pytest.raises(ScoreModeError, match=r"end-of-sequence token; set tokenizer\.eos_token"):
        generate(model, tokenizer, [[0]], 1, settings, batch_size=1)


def test_prompts() -> None:
    from tests.perplexity.texts import byte_level_with_bos

    assert prompt_ids(["ab", "g"], letters(), SIZE) == [[0, 1], [6]]
    assert prompt_ids([[0, 1], np.array([6])], letters(), SIZE) == [[0, 1], [6]]
    assert prompt_ids([f"a{EOS}"], letters(), SIZE) == [[0, END]]
    with_bos = byte_level_with_bos()
    [ids] = prompt_ids(["hello"], with_bos, len(with_bos))
    assert ids[0] == with_bos.bos_token_id and len(ids) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty; give at least one text"),
        ({"prompts": "ab"}, "prompts must be a list, got one str"),
        ({"prompts": ["a", ""]}, r"prompts\[1\] has no token"),
        ({"prompts": [[1], []]}, r"prompts\[1\] has no messages and no token ids"),
        ({"prompts": [["a"]]}, r"prompts\[0\] must be integers, got 'a' at \[0\]"),
        ({"prompts": [[1], [0.5]]}, r"prompts\[1\] must be integers, got 0\.5 at \[0\]"),
        ({"prompts": [[0], [3, SIZE]]}, r"prompts\[1\]\[1\] is 8, outside the vocabulary 0\.\.7"),
        ({"prompts": [[-1]]}, r"prompts\[0\]\[0\] is -1, outside the vocabulary"),
        (
            {"prompts": [[0], [1] * 62]},
            r"prompts\[1\] has 62 tokens: with max_new_tokens=3 .* 64 positions",
        ),
        ({"G": 0}, "G must be a whole number of at least 1 or None, got 0"),
        ({"G": 1.5}, "G must be a whole number of at least 1 or None, got 1.5"),
        ({"gen_batch_size": 0}, "gen_batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_unusable_arguments(change: dict[str, Any], message: str) -> None:
    processor = SequenceProcessor(bigrams(), letters(), config=config())
    with pytest.raises(ScoreModeError, match=message):
        processor.generate_batched(**({"prompts": ["a"], "G": 1} | change))


def test_the_longest_prompt() -> None:
    model = bigram_model(torch.eye(SIZE) * 60)
    batch = SequenceProcessor(model, letters(), config=config()).generate_batched([[1] * 61], 1)
    assert batch.sequences[0, 0, 61:].tolist() == [1, 1, 1]
