"""Random responses, and their scores by one plain forward pass of a float64 model each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers_policy import policy_row
from vllm.score.processor import SequenceProcessor
from vllm.score.processor.backends import HuggingFaceBackend
from vllm.score.processor.config import GenerationConfig, Precision, dtype_name
from vllm.score.processor.overrides import build_state_override
from vllm.score.processor.results import StepValues, Wanted
from vllm.score.processor.sequences import Response, responses_of

VOCAB = 320
SMALL = {"vocab_size": VOCAB, "hidden_size": 64}  # of `model_dir`
EOS = (1, 7)
# Of the prompts and of the responses: responses of no token, of one, prompts of one token.
LENGTHS = [(5, 9), (1, 4), (7, 0), (3, 1), (12, 6)]


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The model of a folder by Hugging Face, without dropout."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def random_responses(
    lengths: Sequence[tuple[int, int]] = LENGTHS, vocab_size: int = VOCAB, seed: int = 0
) -> list[Response]:
    """One response a prompt, of random ids."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Response(i, 0, torch.randint(vocab_size, (n + t,), generator=draw), t)
        for i, (n, t) in enumerate(lengths)
    ]


def plain_logits(model: Any, response: Response) -> torch.Tensor:
    """Logits [T, V] that score the generated tokens: the sequence alone, whole, unpadded."""
    logits = model(response.ids[None]).logits[0]
    return logits[response.prompt_length - 1 : len(response.ids) - 1]


def expected_values(
    model: Any,
    responses: Sequence[Response],
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos: tuple[int, ...] = EOS,
) -> list[dict[str, np.ndarray]]:
    """Every value of every step in float64, by a float64 model."""
    assert next(model.parameters()).dtype == torch.float64
    found = []
    for response in responses:
        with torch.no_grad():
            logits = plain_logits(model, response).numpy()
        rows = [
            policy_row(row, int(token), temperature, top_p, eos)
            for row, token in zip(logits, response.generated, strict=True)
        ]
        names = policy_row(np.zeros(2), 0, 1.0, 1.0).keys() - {"logsumexp"}
        found.append({name: np.array([row[name] for row in rows]) for name in names})
    return found


def assert_values(
    values: Any, expected: Mapping[str, np.ndarray], tolerance: float, names: Sequence[str] = ()
) -> None:
    """Every value within `tolerance`, relative to its size where that is above 1."""
    for name in names or expected:
        got = values[name]
        got = got.detach().numpy() if isinstance(got, torch.Tensor) else got
        assert got.shape == expected[name].shape, name
        np.testing.assert_allclose(got, expected[name], tolerance, tolerance, err_msg=name)


def token_logprobs(model: Any, response: Response, *, grad: bool = False) -> torch.Tensor:
    """log p [T] of the generated tokens, by one plain forward pass."""
    with torch.set_grad_enabled(grad):
        rows = plain_logits(model, response).log_softmax(-1)
        return rows.gather(1, response.generated[:, None]).squeeze(1)


def random_direction(model: Any, seed: int = 3) -> dict[str, torch.Tensor]:
    """A direction by parameter name, of each parameter's size."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
        * p.detach().std(correction=0)
        for name, p in model.named_parameters()
    }


def weights_of(responses: list[Response], seed: int = 5) -> list[torch.Tensor]:
    """A factor of every token's value in a loss."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(r.length, generator=draw, dtype=torch.float64) for r in responses]


def weighted(values: list[torch.Tensor], factors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(v * f).sum() for v, f in zip(values, factors, strict=True)]).sum()


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    return dict(zip(parameters, found, strict=True))


class Backend(HuggingFaceBackend):
    """A backend without a tokenizer, of the tests' end-of-sequence tokens."""

    eos_token_ids = EOS

    def __init__(self, model: Any, **precision: Any) -> None:
        super().__init__(model, None, Precision(**precision))


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    G: int,
    config: GenerationConfig,
    *,
    batch_size: int,
    seed: int | None = None,
) -> list[list[list[int]]]:
    """Responses [B][G] to texts or ids, by Hugging Face."""
    processor = SequenceProcessor(model, tokenizer, config=config)
    batch = processor.generate_batched(prompts, G, batch_size, seed=seed)
    found = [r.generated.tolist() for r in responses_of(batch)]
    return [found[first : first + G] for first in range(0, len(found), G)]


def score_no_grad(
    model: Any,
    mapping: Mapping[str, Any],
    responses: Sequence[Response],
    config: GenerationConfig | None = None,
    *,
    batch_size: int = 2,
    entropy: bool = True,
    diagnostics: bool = True,
) -> list[StepValues]:
    """Values under a mapping, the other parameters as they are."""
    config = replace(config or GenerationConfig(), tf_batch_size=batch_size)
    profile = {"dtype": dtype_name(next(model.parameters()).dtype)}
    wanted = Wanted(config, entropy, diagnostics)
    return Backend(model).score(responses, wanted, profile, override=mapping)


def score_with_grad(
    model: Any,
    responses: Sequence[Response],
    config: GenerationConfig | None = None,
    *,
    batch_size: int = 2,
    profile: Mapping[str, Any] | None = None,
    entropy: bool = True,
    features: bool = False,
    logits_bytes: int | None = None,
) -> list[StepValues]:
    """Values with the graph of the model's parameters."""
    backend = Backend(model)
    backend.logits_bytes = logits_bytes or backend.logits_bytes
    config = replace(config or GenerationConfig(), tf_batch_size=batch_size)
    return backend.score(responses, Wanted(config, entropy, features), profile or {}, graph=True)


def moved_parameters(
    model: Any, direction: Mapping[str, torch.Tensor], eta: float, dtype: Any = torch.float64
) -> dict[str, torch.Tensor]:
    """theta + eta v in a dtype, without buffers."""
    return build_state_override(model, direction, eta, param_dtype=dtype, include_buffers=False)
