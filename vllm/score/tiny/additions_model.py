"""The model that has learned additions: made once and kept in the user's cache."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.tiny.additions import (
    CUE,
    MAX_TERMS,
    MIN_TERMS,
    Problem,
    random_problems,
    tokenizer,
)
from vllm.score.tiny.cached import MODEL_FILES, default_cache_dir, make_once

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from vllm.score.tiny.additions_training import AdditionsRecipe

_NAME = "the model for additions"
_MODEL, _FACTS, _RECIPE = "model", "facts.json", "recipe.json"
_HELD_OUT_SEED = 1_000_003
_HELD_OUT_PROBLEMS = 200  # for each number of terms


@dataclass(frozen=True)
class AdditionsModel:
    """A model made on this machine, for the task of `vllm.score.tiny.additions`.

    Attributes:
        directory: the model and its tokenizer, as Hugging Face and vLLM load them, in float32.
        facts: how it was made and what came out, as in `facts.json`; see `evaluate`.
    """

    directory: Path
    facts: Mapping[str, Any]


def additions_model(
    cache_dir: Path | None = None,
    progress: bool = True,
    *,
    recipe: AdditionsRecipe | None = None,
) -> AdditionsModel:
    """The model for additions; made on the first call (under a minute on one core), then read.

    In the cache it is there whole or not at all, whoever else makes it (`vllm.score.tiny.cached`).
    A changed recipe makes another model.

    Args:
        cache_dir: by default what the environment variable VLLM_SCORE_CACHE names, else the
            user's cache directory (on Linux XDG_CACHE_HOME, or ~/.cache).
        progress: whether to say on standard error that the model is being made, with a bar.
        recipe: another recipe than the default, as tests use.

    Raises:
        ScoreModeError: where the cache cannot be written.
    """
    from vllm.score.tiny.additions_training import AdditionsRecipe

    recipe = recipe or AdditionsRecipe()
    target = Path(cache_dir or default_cache_dir()) / "additions" / recipe.key()
    make_once(
        target,
        _NAME,
        files=(*(f"{_MODEL}/{file}" for file in MODEL_FILES), _FACTS),
        build=partial(_build, recipe=recipe, progress=progress),
        begins="Making the model for additions (once; under a minute on one core)",
        progress=progress,
    )
    return AdditionsModel(target / _MODEL, json.loads((target / _FACTS).read_text()))


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> dict[str, float]:
    """What the model makes of problems with the same number of terms, by one pass over each cut.

    Args:
        problems: at least one; all with the same number of terms.

    Returns:
        `step_probability`: mean probability of the right next sum (behind the last: of the end),
            given right ones before it;
        `sampled_right`: mean probability that reasoning drawn at temperature 1 is right in every
            sum, ends by itself, and that the answer drawn behind it is right;
        `accuracy_none`, `accuracy_half`, `accuracy_all`: share of the problems whose likeliest
            answer is right, behind none, half (rounded down) and all of the right reasoning;
        `entropy_none`, `entropy_half`, `entropy_all`: mean entropy in nats of the answer's token
            there, over the whole vocabulary.
    """
    questions = tokenizer([problem.question for problem in problems])["input_ids"]
    scratchpads = tokenizer([problem.scratchpad for problem in problems])["input_ids"]
    sums = len(scratchpads[0])
    (cue,) = tokenizer.encode(CUE.rstrip())

    whole = [q + s + [tokenizer.eos_token_id] for q, s in zip(questions, scratchpads, strict=True)]
    steps = _log_softmax(model, [ids[:-1] for ids in whole])[:, -sums - 1 :]
    targets = np.array(whole)[:, -sums - 1 :, None]
    step = np.take_along_axis(steps, targets, axis=2)[:, :, 0]
    results = {"step_probability": float(np.exp(step).mean())}

    right = np.array([ids[-1] for ids in scratchpads])
    for name, kept in (("none", 0), ("half", sums // 2), ("all", sums)):
        contexts = [q + s[:kept] + [cue] for q, s in zip(questions, scratchpads, strict=True)]
        answer = _log_softmax(model, contexts)[:, -1]
        results[f"accuracy_{name}"] = float((answer.argmax(axis=1) == right).mean())
        results[f"entropy_{name}"] = float(-(np.exp(answer) * answer).sum(axis=1).mean())
    behind_all = answer[np.arange(len(right)), right]
    results["sampled_right"] = float(np.exp(step.sum(axis=1) + behind_all).mean())
    return results


def _log_softmax(model: LlamaForCausalLM, token_ids: list[list[int]]) -> np.ndarray:
    """float64 [rows, tokens, V], in nats."""
    import torch

    from vllm.score.tiny.replicas import one_openmp_thread

    with torch.no_grad(), one_openmp_thread():
        logits = model(torch.tensor(token_ids), use_cache=False).logits
    return logits.double().log_softmax(-1).numpy()


def _build(folder: Path, recipe: AdditionsRecipe, progress: bool) -> None:
    started = time.perf_counter()
    import torch
    import transformers

    from vllm.score.tiny.additions_training import train
    from vllm.score.tiny.saving import save_model

    words = tokenizer()
    model, loss = train(recipe, words, progress=progress)
    held_out = {
        str(terms): evaluate(
            model,
            words,
            random_problems(
                _HELD_OUT_PROBLEMS, seed=_HELD_OUT_SEED + terms, min_terms=terms, max_terms=terms
            ),
        )
        for terms in range(MIN_TERMS, MAX_TERMS + 1)
    }
    save_model(model, words, folder / _MODEL)
    facts = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training_steps": recipe.steps,
        "training_texts": recipe.steps * recipe.sequences,
        "training_loss_nats": loss,
        "held_out_problems_by_terms": _HELD_OUT_PROBLEMS,
        "held_out_by_terms": held_out,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / _RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
