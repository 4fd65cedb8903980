"""One forward pass, and the head on a few rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processor.teacher_forced import (
    SMALL,
    VOCAB,
    load,
    moved_parameters,
    plain_logits,
    random_direction,
    random_responses,
)
from vllm.score.errors import ScoreModeError
from vllm.score.processor.head import evaluating, head_of, map_logits
from vllm.score.processor.overrides import ZeroMapping, call_with, forward_logits
from vllm.score.processor.sequences import RowBatch, row_batches

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ["llama", "gpt2", "gemma2", "opt", "qwen3"]


@pytest.fixture(scope="module")
def model_of(model_dir: Callable[..., Path]) -> Callable[[str], Any]:
    """Float64 models, loaded once."""
    loaded: dict[str, Any] = {}

    def get(architecture: str) -> Any:
        if architecture not in loaded:
            loaded[architecture] = load(model_dir(architecture, **SMALL))
        return loaded[architecture]

    return get


@contextmanager
def rows_of_head(model: Any) -> Iterator[list[int]]:
    """How many rows each call of the head gets."""
    counts: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: counts.append(args[0].numel() // args[0].shape[-1])
    )
    try:
        yield counts
    finally:
        handle.remove()


def all_logits(model: Any, batch: RowBatch, rows: int, **options: Any) -> list[Tensor]:
    return map_logits(
        model,
        batch,
        lambda logits, tokens: logits,
        logits_bytes=rows * VOCAB * 4,
        **options,
    )


def whole_batch() -> RowBatch:
    return next(row_batches(random_responses(), 99, "cpu"))[1]


def expected_logits(model: Any, batch: RowBatch) -> Tensor:
    with torch.no_grad():
        return torch.cat([plain_logits(model, response) for response in batch.responses])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_sequences_are_those_of_each_alone(
    architecture: str, side: str, model_of: Callable[[str], Any]
) -> None:
    model = model_of(architecture)
    mapping = moved_parameters(model, random_direction(model), 0.02)
    sequences = [r.ids for r in random_responses()]
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), 5)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        ids[i, place], mask[i, place] = sequence, 1
    with torch.no_grad():
        logits = forward_logits(model, ids, mask, mapping)
    assert logits.shape == (len(sequences), width, VOCAB)
    assert logits.dtype == torch.float64

    moved = load_moved(model, mapping)
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            alone = moved(sequence[None]).logits[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=0, atol=1e-5)


def load_moved(model: Any, mapping: dict[str, Tensor]) -> Any:
    import copy

    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.copy_(mapping[name])
    return moved


def test_autocast_is_off(model_of: Callable[[str], Any]) -> None:
    model = model_of("gpt2")
    ids = random_responses()[0].ids[None]
    mapping = ZeroMapping(model).get(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = forward_logits(model, ids, torch.ones_like(ids), mapping)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logits.double(), model(ids).logits, rtol=0, atol=1e-4)


def test_logits_have_gradients_in_the_mapping(model_of: Callable[[str], Any]) -> None:
    model = model_of("gpt2")
    mapping = ZeroMapping(model).get(torch.float64)
    name = "transformer.ln_f.bias"
    mapping[name] = mapping[name].clone().requires_grad_()
    given = dict(mapping)
    ids = random_responses()[0].ids[None]
    logits = forward_logits(model, ids, torch.ones_like(ids), mapping)
    # What comes last before the head: the gradient of the sum is the sum of the head's rows.
    (grad,) = torch.autograd.grad(logits.sum(), mapping[name])
    torch.testing.assert_close(grad, model.lm_head.weight.detach().sum(0) * ids.shape[1])
    assert all(mapping[k] is given[k] for k in given)
    with pytest.raises(ScoreModeError, match="params_override names 'x'"):
        forward_logits(model, ids, torch.ones_like(ids), {"x": ids})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_never_more_rows_than_asked(architecture: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(architecture)
    batch = whole_batch()
    expected = expected_logits(model, batch)
    head_of(model)
    for rows in (1, 3, 8, 99):
        with torch.no_grad(), rows_of_head(model) as counts:
            parts = all_logits(model, batch, rows)
        assert max(counts) <= rows
        # One more, when the decoder runs.
        assert sum(counts) == len(batch.tokens) + 1
        assert max(len(part) for part in parts) == min(rows, len(batch.tokens))
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


def test_never_more_rows_than_asked_in_the_backward_pass(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    head_of(model)
    with rows_of_head(model) as counts:
        parts = map_logits(
            model,
            whole_batch(),
            lambda logits, tokens: logits.logsumexp(1),
            logits_bytes=3 * VOCAB * 4,
            checkpointed=True,
        )
        forward = len(counts)
        torch.autograd.grad(torch.cat(parts).sum(), list(model.parameters()))
    assert len(counts) == 2 * forward - 1
    assert max(counts) == 3


def test_rows_are_bounded_in_bytes_of_the_dtype(model_of: Callable[[str], Any]) -> None:
    with torch.no_grad():
        parts = all_logits(model_of("llama"), whole_batch(), 6, itemsize=8)
        assert {len(part) for part in parts[:-1]} == {3}
        assert {len(part) for part in all_logits(model_of("llama"), whole_batch(), 0)} == {1}


def test_the_decoder_and_its_hooks_run_once(model_of: Callable[[str], Any]) -> None:
    """A hook that changes hidden states, as steering does."""
    model = model_of("gemma2")
    calls = []

    def steer(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    handle = model.get_decoder().register_forward_hook(steer)
    try:
        batch = whole_batch()
        expected = expected_logits(model, batch)
        head_of(model)
        calls.clear()
        with torch.no_grad():
            got = torch.cat(all_logits(model, batch, 3))
        assert len(calls) == 1
    finally:
        handle.remove()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    plain = expected_logits(model, batch)
    assert (plain - expected).abs().max() > 0.1


def test_the_parameters_of_a_mapping_hold_for_decoder_and_head(
    model_of: Callable[[str], Any],
) -> None:
    model = model_of("gpt2")
    mapping = moved_parameters(model, random_direction(model), 0.05)
    with torch.no_grad():
        got = call_with(model, mapping, lambda: torch.cat(all_logits(model, whole_batch(), 3)))
    expected = expected_logits(load_moved(model, mapping), whole_batch())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def positional_llama(folder: Path) -> Any:
    """A model whose head looks at the place of a row in the sequence."""
    from transformers import LlamaForCausalLM

    class PositionalLlama(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            length, columns = output.logits.shape[1:]
            wave = torch.cos(torch.arange(columns) * 1.0)
            output.logits = output.logits + torch.arange(length)[:, None] * wave
            return output

    return PositionalLlama.from_pretrained(folder, dtype=torch.float64).eval()


def test_a_head_that_looks_at_the_place_of_a_row(
    model_dir: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = positional_llama(model_dir("llama", **SMALL))
    batch = whole_batch()
    expected = expected_logits(model, batch)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            got = torch.cat(all_logits(model, batch, 3))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert len(caplog.records) == 1
    assert "PositionalLlama cannot be run apart" in caplog.text


class Bare(torch.nn.Module):
    """A language model that is none of Hugging Face's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return (self.inner(input_ids, attention_mask=attention_mask).logits,)


def test_a_model_without_a_decoder_of_that_name(
    model_of: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    batch = whole_batch()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        got = torch.cat(all_logits(Bare(model_of("llama")), batch, 3))
    torch.testing.assert_close(got, expected_logits(model_of("llama"), batch), rtol=0, atol=1e-5)
    assert "AttributeError" in caplog.text


def test_models_that_insert_tokens_are_refused(model_dir: Callable[..., Path]) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(load(model_dir("llama", **SMALL)), config)
    with torch.no_grad(), pytest.raises(ScoreModeError, match="prompt tuning does, cannot"):
        all_logits(model, whole_batch(), 3)


def test_a_broken_model_does_not_decide_how_it_is_run_when_it_is_mended(
    model_dir: Callable[..., Path],
) -> None:
    model = load(model_dir("gpt2", **SMALL))
    bad = {"transformer.ln_f.weight": torch.full((64,), float("nan"), dtype=torch.float64)}
    with torch.no_grad():
        (logits, *_) = call_with(model, bad, lambda: all_logits(model, whole_batch(), 3))
    assert logits.isnan().all()
    assert head_of(model) is not None


def test_evaluating_gives_every_module_its_mode_back(model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL)).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
