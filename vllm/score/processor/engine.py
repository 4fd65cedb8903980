"""A vLLM engine in score mode that samples responses and scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm.score.api import score as score_with_engine
from vllm.score.armed import require_score_mode
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.policy import StepValues, Wanted
from vllm.score.processor.sequences import TAG, Response, check_fit, eos_token_ids, response_length

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

# What the engine computes for all values of a step, beside the log-probabilities.
STATISTICS = (
    "entropy",
    "head_mass",
    "argmax_logprob",
    "margin",
    "collision_probability",
    "logsumexp",
    "varentropy",
)


class EngineBackend:
    """A vLLM engine, in this process or in others."""

    device = torch.device("cpu")

    def __init__(self, llm: LLM, tokenizer: Any, lora_request: LoRARequest | None) -> None:
        require_score_mode()
        self.llm = llm
        self.tokenizer = tokenizer
        self.lora_request = lora_request
        config = llm.llm_engine.model_config
        self.vocab_size, self.longest = int(config.get_vocab_size()), int(config.max_model_len)
        own = config.try_get_generation_config() or {}
        self.eos_token_ids = sorted(eos_token_ids(tokenizer, own.get("eos_token_id")))

    def generate(
        self,
        prompts: Sequence[list[int]],
        config: GenerationConfig,
        seed: int | None = None,
    ) -> list[list[list[int]]]:
        """Responses [B][G] to prompts [B], as token ids; the engine batches by itself."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=config.num_return_sequences,
            temperature=config.temperature if config.do_sample else 0.0,
            top_p=config.top_p if config.do_sample else 1.0,
            max_tokens=config.max_new_tokens,
            stop=[TAG],
            include_stop_str_in_output=True,
            stop_token_ids=self.eos_token_ids,
            skip_special_tokens=False,
            seed=seed,
        )
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            params,
            use_tqdm=False,
            lora_request=self.lora_request,
        )
        groups = [[list(o.token_ids) for o in output.outputs] for output in outputs]
        return [
            [ids[: response_length(ids, self.tokenizer, self.eos_token_ids)] for ids in group]
            for group in groups
        ]

    def score(self, responses: Sequence[Response], wanted: Wanted) -> list[StepValues]:
        """Values of every response's steps, float32; no logits leave the worker.

        Raises:
            ScoreModeError: a sequence is too long for the engine, or its scores are unsound.
        """
        remedy = "start the engine with a larger max_model_len, or shorten the response"
        check_fit(responses, self.vocab_size, self.longest, remedy)
        config = wanted.config
        eos = self.eos_token_ids if wanted.diagnostics else []
        names = list(STATISTICS) if wanted.diagnostics else ["entropy"] * wanted.entropy
        if not config.samples_model:
            names.append("model_logprob")
        scores = score_with_engine(
            self.llm,
            [_request(r, eos) for r in responses if r.length],
            statistics=names,
            temperature=config.temperature,
            top_p=config.top_p,
            use_tqdm=False,
            lora_request=self.lora_request,
        )
        nothing = np.empty((0, 1 + len(eos)), dtype=np.float32)
        empty = _values(nothing, dict.fromkeys(names, nothing[:, 0]))
        found = (_values(s.logprobs, s.statistics) for s in scores)
        return [next(found) if r.length else empty for r in responses]


def _request(response: Response, eos: list[int]) -> dict[str, Any]:
    tokens = response.generated.tolist()
    targets = [[token, *eos] for token in tokens] if eos else tokens
    return {"prompt_token_ids": response.ids.tolist(), "target_token_ids": targets}


def _values(logprobs: np.ndarray, statistics: Mapping[str, np.ndarray]) -> StepValues:
    """Of one response: log q [T] or, with those of the end-of-sequence tokens, [T, 1 + k]."""
    columns = logprobs if logprobs.ndim == 2 else logprobs[:, None]
    values = {"logq": np.ascontiguousarray(columns[:, 0])}
    values["logprob"] = statistics.get("model_logprob", values["logq"])
    if "entropy" in statistics:
        values["rb_entropy"] = statistics["entropy"]
    if "varentropy" in statistics:
        values |= {
            "head_mass": statistics["head_mass"],
            "top1_prob": np.exp(statistics["argmax_logprob"]),
            "margin": statistics["margin"],
            "collision": statistics["collision_probability"],
            # H(q) = log sum exp a - E_q[a].
            "logit_mean": statistics["logsumexp"] - statistics["entropy"],
            "logit_var": statistics["varentropy"],
        }
    if columns.shape[1] > 1:
        values["eos_prob"] = np.exp(columns[:, 1:]).sum(axis=1)
    return StepValues(**{name: torch.from_numpy(value) for name, value in values.items()})
