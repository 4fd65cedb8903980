"""The engine as a `SequenceProcessor`'s backend, against float64 Hugging Face row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers_policy import policy_row
from vllm.score.errors import ScoreModeError
from vllm.score.processor import GenerationConfig, SequenceProcessor
from vllm.score.processor.sequences import pad_batch, responses_of

PROMPTS = ["def write(self", "import os", "The quick brown fox jumps over the lazy dog."]
STEPS = (
    "rb_entropy",
    "head_mass",
    "top1_prob",
    "margin",
    "collision",
    "logit_mean",
    "logit_var",
    "eos_prob",
)


@pytest.fixture(scope="module")
def model(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact(model):
    import copy

    return copy.deepcopy(model).double()


def float64_rows(exact, response) -> np.ndarray:
    with torch.no_grad():
        logits = exact(response.ids[None]).logits[0]
    return logits[response.prompt_length - 1 : -1].numpy()


def processor(llm, model=None, **generation):
    return SequenceProcessor(model, llm=llm, config={"generation": generation})


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (0.8, 0.9)])
def test_every_value_against_float64(llm, exact, temperature, top_p):
    sp = processor(llm, temperature=temperature, top_p=top_p, max_new_tokens=12)
    batch, scores, diagnostics = sp.generate_with_logprobs(PROMPTS, 3, compute_rb=True)
    assert batch.sequences.shape[:2] == (3, 3)
    compared = 0
    for r in responses_of(batch):
        b, g = r.prompt, r.number
        pack = diagnostics.diagnostics[b][g]
        logits = float64_rows(exact, r)
        rows = [
            policy_row(z, int(t), temperature, top_p, eos=tuple(sp._engine.eos_token_ids))
            for z, t in zip(logits, r.generated, strict=True)
        ]
        for name in STEPS:
            np.testing.assert_allclose(
                getattr(pack.step, name), [row[name] for row in rows], atol=5e-5, err_msg=name
            )
        logp, logq = scores.logprobs[b][g], scores.token_logqs[b][g]
        assert logp.dtype == torch.float32 and logp.device.type == "cpu" and not logp.requires_grad
        np.testing.assert_allclose(logp, [row["logprob"] for row in rows], atol=3e-5)
        np.testing.assert_allclose(logq, [row["logq"] for row in rows], atol=3e-5)
        np.testing.assert_allclose(scores.entropies[b][g], -logp.numpy())
        np.testing.assert_allclose(
            scores.rb_entropies[b][g], [row["rb_entropy"] for row in rows], atol=5e-5
        )
        assert scores.sequence_logprobs[b][g] == pytest.approx(float(logp.sum()), abs=1e-4)
        assert scores.sequence_logqs[b][g] == pytest.approx(float(logq.sum()), abs=1e-4)
        assert pack.seq.T == r.length == batch.gen_lens[b][g] == len(rows)
        compared += r.length
    assert compared > 60


def test_both_backends_agree(llm, model):
    tokenizer = llm.get_tokenizer()
    config = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 9, "num_return_sequences": 2}
    engine = processor(llm, **config)
    hf = SequenceProcessor(model, tokenizer, config={"generation": config})
    batch = hf.generate_batched(PROMPTS)
    one, left = engine.teacher_force_logprobs_with_diagnostics(batch, compute_rb=True)
    two, right = hf.teacher_force_logprobs_with_diagnostics(batch, compute_rb=True)
    for b in range(3):
        for g in range(2):
            torch.testing.assert_close(one.logprobs[b][g], two.logprobs[b][g], atol=3e-5, rtol=0)
            torch.testing.assert_close(
                one.token_logqs[b][g], two.token_logqs[b][g], atol=3e-5, rtol=0
            )
            first, second = left.diagnostics[b][g], right.diagnostics[b][g]
            for name, value in vars(first.step).items():
                np.testing.assert_allclose(
                    value, vars(second.step)[name], atol=1e-4, rtol=1e-4, err_msg=name
                )
            for name, value in vars(first.seq).items():
                np.testing.assert_allclose(
                    value, vars(second.seq)[name], atol=1e-3, rtol=1e-4, err_msg=name
                )


def test_greedy_responses_are_the_same(llm, model):
    config = {"do_sample": False, "max_new_tokens": 10, "num_return_sequences": 1}
    one = processor(llm, **config).generate_batched(PROMPTS)
    two = SequenceProcessor(
        model, llm.get_tokenizer(), config={"generation": config}
    ).generate_batched(PROMPTS)
    assert torch.equal(one.sequences, two.sequences)
    assert one.gen_lens == two.gen_lens
    assert one.responses_text == two.responses_text


def test_the_tag_ends_a_response_in_the_engine(llm, monkeypatch):
    sp = processor(llm, do_sample=False, max_new_tokens=12)
    whole = sp.generate_batched(PROMPTS[:1], 1)
    text = whole.responses_text[0][0]
    tag = text[4:7]
    for module in ("sequences", "backends"):
        monkeypatch.setattr(f"vllm.score.processor.{module}.TAG", tag)
    cut = sp.generate_batched(PROMPTS[:1], 1)
    assert 0 < cut.gen_lens[0][0] < whole.gen_lens[0][0]
    assert tag in cut.responses_text[0][0]
    assert text.startswith(cut.responses_text[0][0])


def test_lengths_of_nothing_and_an_end_in_the_middle(llm, exact):
    tokenizer = llm.get_tokenizer()
    eos = tokenizer.eos_token_id
    prompts = [[5, 6, 7], [8]]
    responses = [[[], [9, eos, 10]], [[eos], [11, 12, 13, 14]]]
    batch = pad_batch(prompts, responses, tokenizer.pad_token_id or 0, tokenizer.decode)
    scores, diagnostics = processor(llm).teacher_force_logprobs_with_diagnostics(batch)
    assert scores.logprobs[0][0].shape == (0,) and scores.sequence_logprobs[0][0] == 0.0
    assert diagnostics.diagnostics[0][0].seq.T == 0
    assert np.isnan(diagnostics.diagnostics[0][0].seq.rb_entropy_mean)
    for r in responses_of(batch):
        if r.length:
            rows = torch.from_numpy(float64_rows(exact, r)).log_softmax(-1)
            want = rows.gather(1, r.generated[:, None])[:, 0].float()
            torch.testing.assert_close(scores.logprobs[r.prompt][r.number], want, atol=3e-5, rtol=0)


def test_gradients_and_overrides_come_from_the_model(llm, model):
    sp = processor(llm, model, max_new_tokens=4)
    batch = sp.generate_batched(PROMPTS[:1], 2)
    plain = sp.teacher_force_logprobs(batch)
    graph = sp.teacher_force_logprobs(batch, with_grad=True)
    assert graph.logprobs[0][0].requires_grad
    torch.testing.assert_close(
        graph.logprobs[0][0].detach().cpu(), plain.logprobs[0][0], atol=3e-5, rtol=0
    )
    moved = sp._build_params_override({"model.norm.weight": model.model.norm.weight}, 0.1)
    other = sp.teacher_force_logprobs(batch, params_override=moved)
    assert (other.logprobs[0][0] - plain.logprobs[0][0]).abs().max() > 1e-3
    alone = processor(llm)
    with pytest.raises(ScoreModeError, match=r"with_grad=True needs the Hugging Face model"):
        alone.teacher_force_logprobs(batch, with_grad=True)
    with pytest.raises(ScoreModeError, match=r"params_override needs the Hugging Face model"):
        alone.teacher_force_logprobs(batch, params_override=moved)


def test_what_the_engine_cannot_do_is_refused(llm, model):
    tokenizer = llm.get_tokenizer()
    with pytest.raises(ScoreModeError, match="entropy_fp64=True needs backend='hf'"):
        SequenceProcessor(llm=llm, config={"precision": {"entropy_fp64": True}})
    with pytest.raises(ScoreModeError, match="model must be a Hugging Face model, got LLM"):
        SequenceProcessor(llm, tokenizer)
    with pytest.raises(ScoreModeError, match="backend='vllm' needs llm"):
        SequenceProcessor(model, tokenizer, backend="vllm")
    with pytest.raises(ScoreModeError, match="there are hf, vllm"):
        SequenceProcessor(model, tokenizer, backend="jax")
    with pytest.raises(ScoreModeError, match="backend='hf' needs model"):
        SequenceProcessor(None, tokenizer, backend="hf")
    with pytest.raises(ScoreModeError, match=r"tokenizer must be .* got NoneType"):
        SequenceProcessor(model)
    sp = processor(llm, max_new_tokens=2040)
    with pytest.raises(
        ScoreModeError,
        match=r"prompts\[0\] has \d+ tokens: .*max_model_len",
    ):
        sp.generate_batched(["a b c d e f g h i j k l m n o p q r s t u v w x y z"], 1)
    long = pad_batch([[5] * 2000], [[[6] * 100]], 0, lambda ids: "")
    with pytest.raises(ScoreModeError, match=r"response \[0\]\[0\] has 2100 .* max_model_len"):
        sp.teacher_force_logprobs(long)


def test_the_configuration_is_not_replaced_by_a_dict(llm):
    sp = processor(llm)
    with pytest.raises(ScoreModeError, match="config must be a GenerationConfig, got dict"):
        sp.config = {"generation": {"top_p": 0.9}}
    sp.config = GenerationConfig(top_p=0.9)
    sp.config.temperature = 0.5
    with pytest.raises(ScoreModeError, match=r"top_p must be a number above 0 .*, got 1\.5"):
        sp.config.top_p = 1.5
    with pytest.raises(ScoreModeError, match="did you mean 'top_p'"):
        sp.config.topp = 0.5
