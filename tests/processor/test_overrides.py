"""Parameters moved along a direction, and the mapping that moves nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processor.teacher_forced import (
    SMALL,
    VOCAB,
    load,
    moved_parameters,
    random_direction,
    random_responses,
    score_no_grad,
    token_logprobs,
)
from vllm.score.errors import ScoreModeError
from vllm.score.processor import SequenceProcessor
from vllm.score.processor.overrides import (
    ZeroMapping,
    build_state_override,
    checked_mapping,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpt2(model_dir: Callable[..., Path]) -> Any:
    """Float64 throughout, which Llama's norms are not."""
    return load(model_dir("gpt2", **SMALL), torch.float64)


def logprobs(model: Any, mapping: dict[str, Tensor]) -> Tensor:
    """Of all tokens of the responses, one after the other."""
    options = {"batch_size": 3, "diagnostics": False, "entropy": False}
    scores = score_no_grad(model, mapping, random_responses(), **options)
    return torch.cat([s["logprob"] for s in scores])


def moved_model(model: Any, direction: dict[str, Tensor], eta: float) -> Any:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in direction:
                parameter += eta * direction[name]
    return moved


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_override_scores_as_a_model_that_was_really_moved(
    architecture: str, model_dir: Callable[..., Path]
) -> None:
    model = load(model_dir(architecture, **SMALL), torch.float64)
    direction = random_direction(model)
    before = logprobs(model, ZeroMapping(model).get(torch.float64))
    for eta in (0.01, -1e-3):
        moved = moved_model(model, direction, eta)
        expected = torch.cat([token_logprobs(moved, r) for r in random_responses()])
        assert (expected - before).abs().max() > 1e-4
        got = logprobs(model, moved_parameters(model, direction, eta))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    # And the model is what it was.
    after = torch.cat([token_logprobs(model, r) for r in random_responses()])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_continuity_and_linearity_in_eta(gpt2: Any) -> None:
    """f(eta) = f(0) + eta f'(0) + O(eta^2), central differences with an error of O(eta^2)."""
    direction = random_direction(gpt2)
    steps = [0.004, 0.002, 0.001]

    def at(eta: float) -> Tensor:
        return logprobs(gpt2, moved_parameters(gpt2, direction, eta))

    exact = torch.cat([directional(gpt2, direction, r) for r in random_responses()])
    start = logprobs(gpt2, ZeroMapping(gpt2).get(torch.float64))
    central, remainder = [], []
    for eta in steps:
        up, down = at(eta), at(-eta)
        central.append(((up - down) / (2 * eta) - exact).abs().max().item())
        remainder.append((up - start - eta * exact).abs().max().item())
    for errors in (central, remainder):
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    assert central[-1] < 1e-3 * exact.abs().max()
    assert (at(1e-9) - start).abs().max() < 2e-9 * exact.abs().max()
    assert torch.equal(at(0.0), start)


def directional(model: Any, direction: dict[str, Tensor], response: Any) -> Tensor:
    """Exact derivative of log p of every token along a direction (one backward pass a token)."""
    parameters = dict(model.named_parameters())
    rows = []
    for value in token_logprobs(model, response, grad=True):
        grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        rows.append(sum((g * direction[n]).sum() for n, g in zip(parameters, grads, strict=True)))
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)  # type: ignore[arg-type]


def test_casts(gpt2: Any, model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL), torch.bfloat16)
    name = "transformer.h.0.mlp.c_fc.weight"
    base = dict(model.named_parameters())[name]
    direction = {name: torch.randn(base.shape, generator=torch.Generator().manual_seed(1))}
    exact = base.detach().double() + 1e-3 * direction[name].double()

    processor = SequenceProcessor(model, SimpleNamespace(eos_token_id=None))
    wide = processor.build_params_override(direction, 1e-3)
    assert {t.dtype for t in wide.values()} == {torch.float32}
    torch.testing.assert_close(wide[name].double(), exact, rtol=1e-6, atol=1e-8)
    processor._fo_cfg["cast_params"] = False
    own = processor.build_params_override(direction, 1e-3)
    assert {t.dtype for t in own.values()} == {torch.bfloat16}
    # Rounded once.
    assert torch.equal(own[name], wide[name].to(torch.bfloat16))
    double = moved_parameters(model, direction, 1e-3)
    torch.testing.assert_close(double[name], exact, rtol=1e-14, atol=1e-16)
    assert base.dtype == torch.bfloat16
    assert not any(t.requires_grad for t in [*wide.values(), *own.values(), *double.values()])
    assert wide.keys() == dict(gpt2.named_parameters()).keys()


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.register_buffer("steps", torch.tensor(4))


def test_state_with_and_without_buffers() -> None:
    model = WithBuffers()
    direction = {"weight": torch.tensor([1.0, 0.0, -1.0])}
    plain = build_state_override(
        model, direction, 0.5, param_dtype="float64", include_buffers=False
    )
    assert plain.keys() == {"weight", "codes"}
    assert plain["weight"].tolist() == [1.5, 1.0, 0.5]
    assert plain["weight"].dtype == torch.float64
    assert plain["codes"].dtype == torch.int64
    both = build_state_override(
        model, None, 0.5, param_dtype=None, include_buffers=True, buffer_dtype=torch.bfloat16
    )
    assert {n: t.dtype for n, t in both.items()} == {
        "weight": torch.float32,
        "codes": torch.int64,
        "scale": torch.bfloat16,
        "steps": torch.int64,
    }
    with pytest.raises(ScoreModeError, match=r"'codes'. moves a parameter of dtype int64"):
        moved_parameters(model, {"codes": torch.ones(3)}, 1.0)


def test_names_with_the_prefix_of_a_wrapper(gpt2: Any) -> None:
    direction = random_direction(gpt2)
    prefixed = {f"module.{name}": v for name, v in direction.items()}
    plain = moved_parameters(gpt2, direction, 0.1)
    for name, value in moved_parameters(gpt2, prefixed, 0.1).items():
        assert torch.equal(value, plain[name])
    assert checked_mapping(gpt2, prefixed).keys() == direction.keys()


WEIGHT = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"transformer.ln_f.wight": torch.ones(64)}, "'transformer.ln_f.wight', .*did you mean '"),
        ({WEIGHT: torch.ones(63)}, r"shape \(64,\), got \(63,\)"),
        ({WEIGHT: 1.0}, r"shape \(64,\), got float"),
        ({WEIGHT: torch.full((64,), math.nan)}, f"{WEIGHT}'. has entries that are NaN"),
        ({WEIGHT: torch.ones(64), f"module.{WEIGHT}": torch.ones(64)}, "twice"),
        ({"lm_head.weight": torch.ones(VOCAB, 64)}, "tied to 'transformer.wte.weight'"),
        ([1.0], r"v_named must be a dict, got \[1.0\]"),
    ],
)
def test_directions_that_do_not_fit(gpt2: Any, direction: Any, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        moved_parameters(gpt2, direction, 0.1)


@pytest.mark.parametrize("eta", [math.nan, math.inf, "1", None, True])
def test_steps_that_are_no_number(gpt2: Any, eta: Any) -> None:
    with pytest.raises(ScoreModeError, match="eta must be a number, got"):
        moved_parameters(gpt2, {}, eta)


def test_mappings_that_do_not_fit(gpt2: Any) -> None:
    with pytest.raises(ScoreModeError, match="params_override names 'nothing'"):
        checked_mapping(gpt2, {"nothing": torch.ones(1)})
    with pytest.raises(ScoreModeError, match=r"tied to 'transformer.wte.weight'"):
        checked_mapping(gpt2, {"lm_head.weight": torch.ones(VOCAB, 64)})
    with pytest.raises(ScoreModeError, match="must be a tensor of the shape"):
        checked_mapping(gpt2, {WEIGHT: torch.ones(1)})
    with pytest.raises(ScoreModeError, match="param_dtype 'int8' is unknown"):
        build_state_override(gpt2, {}, 0.0, param_dtype="int8", include_buffers=False)


# The zero mapping


def optimiser_step(model: Any) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    token_logprobs(model, random_responses()[0], grad=True).sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def load_other_weights(model: Any) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def assign_other_weights(model: Any) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()


def replace_a_parameter(model: Any) -> None:
    norm = model.transformer.ln_f
    norm.weight = nn.Parameter(norm.weight.detach() * 1.5)


def write_through_data(model: Any) -> None:
    model.transformer.ln_f.weight.data.mul_(1.5)


def change_dtype(model: Any) -> None:
    model.to(torch.float32)
    replace_a_parameter(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "change",
    [
        optimiser_step,
        load_other_weights,
        assign_other_weights,
        replace_a_parameter,
        write_through_data,
        change_dtype,
    ],
)
def test_the_zero_mapping_is_never_stale(
    change: Callable[[Any], None], dtype: torch.dtype, model_dir: Callable[..., Path]
) -> None:
    model = load(model_dir("gpt2", **SMALL), dtype)
    zero = ZeroMapping(model)
    before = logprobs(model, zero.get(torch.float32))
    change(model)
    after = logprobs(model, zero.get(torch.float32))
    wide = copy.deepcopy(model).double()
    expected = torch.cat([token_logprobs(wide, r) for r in random_responses()])
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_zero_mapping_keeps_its_copies_and_makes_none_where_none_is_needed(gpt2: Any) -> None:
    zero = ZeroMapping(gpt2)
    own = zero.get(torch.float64)
    parameters = dict(gpt2.named_parameters())
    assert all(own[n].data_ptr() == p.data_ptr() for n, p in parameters.items())
    assert not any(t.requires_grad for t in own.values())
    first, second = zero.get(torch.float32), zero.get(torch.float32)
    assert {t.dtype for t in first.values()} == {torch.float32}
    assert all(first[n].data_ptr() == second[n].data_ptr() for n in parameters)
    assert WithBuffers().codes.dtype == ZeroMapping(WithBuffers()).get(torch.float32)["codes"].dtype
