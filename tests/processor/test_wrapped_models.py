"""Models inside of PEFT and of DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processor.teacher_forced import (
    SMALL,
    gradients,
    load,
    moved_parameters,
    random_direction,
    random_responses,
    score_no_grad,
    score_with_grad,
    token_logprobs,
    weighted,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_override_of_an_adapter(targets: list[str], model_dir: Callable[..., Path]) -> None:
    """Only the adapter moves, also where it is one of the head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.3)
    model = get_peft_model(load(model_dir("llama", **SMALL)), config).double()
    responses = random_responses()
    adapter = {n: v for n, v in random_direction(model).items() if "lora_" in n}
    assert adapter
    mapping = moved_parameters(model, adapter, 0.1)
    scores = score_no_grad(model, mapping, responses)
    before = score_no_grad(model, {}, responses)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in adapter:
                parameter += 0.1 * adapter[name]
    merged = model.merge_and_unload()
    for values, old, response in zip(scores, before, responses, strict=True):
        expected = token_logprobs(merged.eval(), response).numpy()
        np.testing.assert_allclose(values["logprob"], expected, 0, 1e-5)
        if response.length:
            assert (values["logprob"] - old["logprob"]).abs().max() > 1e-3


def test_gradients_of_an_adapter(model_dir: Callable[..., Path]) -> None:
    """Gradients of the adapter alone."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(load(model_dir("llama", **SMALL)), config).double()
    responses = random_responses()
    factors = weights_of(responses)
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapter)
    ours = torch.autograd.grad(
        weighted(
            [s["logprob"] for s in score_with_grad(model, responses)],
            factors,
        ),
        list(adapter.values()),
    )
    plain = [token_logprobs(model, r, grad=True) for r in responses]
    theirs = torch.autograd.grad(weighted(plain, factors), list(adapter.values()))
    for name, one, other in zip(adapter, ours, theirs, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * size, msg=name)


@contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone; an engine of the same session may have one already."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_module_of_distributed_data_parallel(model_dir: Callable[..., Path]) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = load(model_dir("gpt2", **SMALL))
    responses = random_responses()
    factors = weights_of(responses)
    plain = [token_logprobs(model, r, grad=True) for r in responses]
    expected = gradients(weighted(plain, factors), model)
    with process_group():
        parallel = DistributedDataParallel(model)
        direction = {n: torch.ones_like(p) for n, p in parallel.named_parameters()}
        assert all(name.startswith("module.") for name in direction)
        mapping = moved_parameters(parallel.module, direction, 0.5)
        weighted(
            [s["logprob"] for s in score_with_grad(parallel.module, responses)],
            factors,
        ).backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(mapping[name], parameter.detach() + 0.5)
            torch.testing.assert_close(parameter.grad, expected[name])
        del parallel
