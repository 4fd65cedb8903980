"""One family of `architectures.py`, in a process of its own.

    python benchmarks/architecture_case.py gemma2        # prints one line of JSON

A tiny model with random weights, saved by transformers in float32; one engine that scores prompts
of token ids in score mode and by stock vLLM's `prompt_logprobs`; and Hugging Face in float64 on
the saved files.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
import warnings
import zlib
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from architecture_families import FAMILIES, LENGTHS, STEP_TOKENS, VOCABULARY, Family

# Over a row of logits, in nats, before an architecture's own factors and caps.
LOGIT_STD = 2.0
# What is added to whatever a norm, bias, sink or state begins with.
JITTER = 0.2
STEP = "# at "  # begins a line of the log
CACHE_BYTES = 128 << 20


def main() -> None:
    print(json.dumps(measure(sys.argv[1])), flush=True)
    # What an engine does when it is taken down is no part of the case.
    os._exit(0)


def import_all() -> None:
    """What takes long to import, before processes are forked."""
    from transformers import AutoModelForCausalLM  # noqa: F401

    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.score import score  # noqa: F401
    from vllm.v1.worker import gpu_model_runner  # noqa: F401


def measure(name: str) -> dict[str, Any]:
    """What is found for a family of this name.

    Returns:
        {step, reference}, then the largest differences of a token's log-probability
        in nats: of score mode (`ours`) and `stock` from Hugging Face and from each other; an
        `error` in one sentence where a step fails. `warnings` are score mode's.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(FAMILIES[name], folder, found)
        except Exception as error:
            found["error"] = sentence(error)
    return found


def run(family: Family, folder: str, found: dict[str, Any]) -> None:
    begin(found, "transformers")
    make_model(family, folder)
    prompts = random_prompts()
    wants, found["reference"] = reference(family, folder, prompts)
    begin(found, "vLLM's start")
    architecture = architecture_of(family)
    amend_config(folder, {"architectures": [architecture], **family.served})
    inspect_here(architecture)
    llm = open_engine(family, folder)
    begin(found, "the scores")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        ours = score_mode(llm, prompts)
    found["warnings"] = [str(w.message) for w in said if w.category is RuntimeWarning]
    found["ours"] = worst(ours, wants)
    begin(found, "stock prompt_logprobs")
    stocks = stock(llm, prompts)
    found["stock"] = worst(stocks, wants)
    found["ours_stock"] = worst(ours, stocks)
    # Score mode leaves the last token of a prompt out: here stock computes the same rows.
    shorter = stock(llm, [p[:-1] for p in prompts])
    found["ours_stock_same_rows"] = worst([o[:-1] for o in ours], shorter)
    found["stock_rows"] = worst([s[:-1] for s in stocks], shorter)


def begin(found: dict[str, Any], step: str) -> None:
    """Note the step, also for whoever finds the log of a process that died."""
    found["step"] = step
    print(f"{STEP}{step}", file=sys.stderr, flush=True)


def random_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, n).tolist() for n in LENGTHS]


def architecture_of(family: Family) -> str:
    """vLLM's name of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return family.architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]


def make_model(family: Family, folder: str) -> None:
    """Save a model of the family with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.model_type, **family.settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(folder)


def draw_weights(model: Any) -> None:
    """Fill every parameter and stored buffer, each from a generator of its own.

    A linear map keeps the size of its input; what starts as a constant or a vector is moved off
    it, so that a forgotten scale, bias, sink or state shows.
    """
    import torch

    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    tables = {id(module.weight) for module in embeddings if module is not None}
    stored = model.state_dict(keep_vars=True)
    for name, tensor in {id(t): (n, t) for n, t in stored.items()}.values():
        # xIELU stores its constants.
        if not tensor.is_floating_point() or name.endswith((".act_fn.beta", ".act_fn.eps")):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if id(tensor) in tables:
                tensor.copy_(noise * (LOGIT_STD / math.sqrt(tensor.shape[1])))
            elif tensor.dim() < 2 or not name.endswith(("weight", "proj", "experts")):
                tensor.add_(noise * JITTER)
            else:
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))


def reference(
    family: Family, folder: str, prompts: list[list[int]]
) -> tuple[list[np.ndarray], str]:
    """Hugging Face's log-probabilities [n-1] of each prompt, and the dtype it could run in."""
    import torch

    try:
        return hugging_face(family, folder, prompts, torch.float64), "float64"
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
    return hugging_face(family, folder, prompts, torch.float32), "float32"


def hugging_face(
    family: Family, folder: str, prompts: list[list[int]], dtype: Any
) -> list[np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=family.attention,
        experts_implementation="eager",  # the fused ones have no float64
    ).eval()
    values = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1]
        rows = logits.double().log_softmax(-1)
        values.append(rows.gather(1, ids[0, 1:, None])[:, 0].numpy())
    return values


def amend_config(folder: str, fields: dict[str, Any]) -> None:
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def inspect_here(architecture: str) -> None:
    """vLLM asks a process of its own about each class, which imports all of vLLM for it."""
    from vllm import ModelRegistry

    lazy = ModelRegistry.models[architecture]
    ModelRegistry.register_model(architecture, lazy.load_model_cls())


def open_engine(family: Family, folder: str) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        **{
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": STEP_TOKENS,
            "kv_cache_memory_bytes": CACHE_BYTES,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **family.engine,
        },
    )


def score_mode(llm: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    from vllm.score import score

    results = score(llm, prompts, use_tqdm=False, skip_prefix_cache=True)
    return [r.logprobs.astype(np.float64) for r in results]


def stock(llm: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    """Stock vLLM's log-probabilities of the prompts' own tokens, [n-1] each."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=0,
            skip_reading_prefix_cache=True,
            detokenize=False,
        ),
        use_tqdm=False,
    )
    return [
        np.array([o.prompt_logprobs[i][p[i]].logprob for i in range(1, len(p))])
        for o, p in zip(outputs, prompts, strict=True)
    ]


def worst(values: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The largest difference, in nats; NaN where a value is none."""
    pairs = zip(values, others, strict=True)
    return float(np.max([np.abs(v - o).max(initial=0.0) for v, o in pairs]))


def sentence(error: BaseException) -> str:
    """The error that began it, in one line; one without a message by its place."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if not text:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{last.line} ({Path(last.filename).name}, {last.name})"
    return f"{type(error).__name__}: {text}"[:200]


if __name__ == "__main__":
    main()
