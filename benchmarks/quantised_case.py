"""One format of `quantised.py`, in a process of its own: checkpoint, engine, references, figures.

    python benchmarks/quantised_case.py SPECIFICATION.json

The specification names the case and the sizes; the figures go to the file it names as `out`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))  # of tests.support

import engines
import numpy as np

KV_CACHE_BYTES = 1 << 30
MIB = 2**20


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    folders = checkpoints(spec)
    served, prompts, found = serve(folders["served"], spec)
    gc.collect()
    found |= differences(served, prompts, folders, spec)
    Path(spec["out"]).write_text(json.dumps(found))
    # The figures are written: what an engine does when it is taken down is no part of the case.
    os._exit(0)


def serve(folder: Path, spec: dict[str, Any]) -> tuple[np.ndarray, list[list[int]], dict[str, Any]]:
    """The engine's log-probabilities [prompts, n-1], the prompts, and what the engine is like."""
    llm = open_engine(folder, spec)
    prompts = prompts_of(llm, spec)
    engines.scores(llm, prompts[:1])
    peak, results = peak_of(lambda: engines.scores(llm, prompts))
    served = engines.score_values(results).astype(np.float64)
    found = {
        **kernels(llm),
        "engine": engines.describe(llm),
        "tokens": served.size,
        **weights(llm, folder),
        "scoring_mib": "" if peak is None else round(peak / MIB, 1),
    }
    return served, prompts, found


def checkpoints(spec: dict[str, Any]) -> dict[str, Path]:
    """Folders of the model as it was ("source"), is served, and is meant ("plain", float32)."""
    from tests.support.dequantised import dequantise_model
    from tests.support.quantised import quantise_model
    from vllm.score.tiny.random_models import make_random_model

    root = Path(spec["folder"])
    source = root / f"source-{spec['dtype']}"
    if not (source / "model.safetensors").exists():
        make_random_model(source, "llama", dtype=spec["dtype"], **spec["model"])
    served = source
    if spec["scheme"]:
        served = root / "served"
        quantise_model(source, served, spec["scheme"], quantise_head=spec["head"])
    plain = dequantise_model(served, root / "plain")
    return {"source": source, "served": served, "plain": plain}


def open_engine(folder: Path, spec: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype=spec["dtype"],
        enforce_eager=True,
        max_model_len=spec["length"] + 1,
        max_num_seqs=64,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        **({} if engines.on_gpu() else {"distributed_executor_backend": "uni"}),
    )


def prompts_of(llm: Any, spec: dict[str, Any]) -> list[list[int]]:
    """Texts drawn from the model before it was quantised: its own perplexity is a plain figure.

    The first case, which serves that model, draws them; the others find them.
    """
    file = Path(spec["folder"], "prompts.json")
    if not file.exists():
        from vllm import SamplingParams

        starts = engines.random_prompts(spec["prompts"], 1, spec["model"]["vocab_size"])
        sampling = SamplingParams(
            temperature=1.0, max_tokens=spec["length"] - 1, ignore_eos=True, seed=0
        )
        outputs = llm.generate([{"prompt_token_ids": s} for s in starts], sampling, use_tqdm=False)
        texts = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
        file.write_text(json.dumps(texts))
    return json.loads(file.read_text())


def peak_of(run: Any) -> tuple[int | None, Any]:
    """Bytes on the device at the peak of a run over those before it; None on a CPU."""
    if not engines.on_gpu():
        return None, run()
    from gpu_memory import device_peak

    return device_peak(run)


def linear_layers(llm: Any) -> list[Any]:
    """The engine's linear layers and its head."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    kinds = (LinearBase, ParallelLMHead)
    (layers,) = llm.apply_model(lambda m: [x for x in m.modules() if isinstance(x, kinds)])
    return layers


def kernels(llm: Any) -> dict[str, str]:
    """Names of the products that vLLM chose for its linear layers and for its head."""
    from vllm.model_executor.layers.linear import LinearBase

    names: dict[str, set[str]] = {"kernel": set(), "head_kernel": set()}
    for layer in linear_layers(llm):
        inside = [layer, getattr(layer, "scheme", None)]
        values = [v for holder in inside if holder is not None for v in vars(holder).values()]
        chosen = {type(v).__name__ for v in values if type(v).__name__.endswith("Kernel")}
        column = "kernel" if isinstance(layer, LinearBase) else "head_kernel"
        names[column] |= chosen or {type(layer.quant_method).__name__}
    return {column: "+".join(sorted(found)) for column, found in names.items()}


def weights(llm: Any, served: Path) -> dict[str, Any]:
    """MiB of the linear layers, head included: as 16-bit numbers, in the file, in the engine.

    On a CPU some kernels keep their weights out of PyTorch's sight.
    """
    from tests.support.quantised import load_tensors

    stored = load_tensors(served)
    names = {n.rpartition(".")[0] for n, t in stored.items() if t.ndim == 2}
    layers = [n for n in names if n.endswith(("_proj", "lm_head"))]
    in_file = [t for n, t in stored.items() if n.rpartition(".")[0] in layers]
    storages = {}
    entries = 0
    for layer in linear_layers(llm):
        held = [v for v in vars(layer).values() if hasattr(v, "untyped_storage")]
        for tensor in [*layer.parameters(), *layer.buffers(), *held]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        size = getattr(layer, "output_size", None) or layer.num_embeddings
        entries += size * (getattr(layer, "input_size", None) or layer.embedding_dim)
    found: dict[str, Any] = {
        "linear_16bit_mib": round(2 * entries / MIB, 1),
        "linear_file_mib": round(sum(t.numel() * t.itemsize for t in in_file) / MIB, 1),
    }
    if engines.on_gpu():
        found["linear_engine_mib"] = round(sum(storages.values()) / MIB, 1)
        (usage,) = llm.collective_rpc(
            lambda worker: getattr(worker.model_runner, "model_memory_usage", None)
        )
        found["model_engine_mib"] = "" if usage is None else round(usage / MIB, 1)
    return found


def differences(
    served: np.ndarray, prompts: list[list[int]], folders: dict[str, Path], spec: dict[str, Any]
) -> dict[str, Any]:
    """How far the engine is from Hugging Face, in nats, and the perplexities."""
    from tests.support.dequantised import activation_format

    to = activation_format(folders["served"]) if spec["scheme"] else None
    head = bool(spec["head"])
    exact = reference(folders["plain"], prompts, None, head, "float64")
    simulated = exact if to is None else reference(folders["plain"], prompts, to, head, "float64")
    same = reference(folders["plain"], prompts, to, head, spec["dtype"])
    original = exact
    if spec["scheme"]:
        original = reference(folders["source"], prompts, None, head, "float64")
    pairs = {
        "from_exact": (served, exact),
        "from_simulated": (served, simulated),
        "hf_same_from_exact": (same, exact),
        "hf_same_from_simulated": (same, simulated),
        "of_rounded_inputs": (simulated, exact),
        "of_quantisation": (exact, original),
    }
    found: dict[str, Any] = {
        "inputs_rounded_to": {"int": "int8", "float": "e4m3"}.get(to or "", "")
    }
    for name, (one, other) in pairs.items():
        difference = np.abs(one - other)
        found[f"mean_{name}"] = float(difference.mean())
        found[f"max_{name}"] = float(difference.max())
    values = {"served": served, "exact": exact, "simulated": simulated, "unquantised": original}
    found |= {f"perplexity_{n}": float(np.exp(-v.mean())) for n, v in values.items()}
    return found


def reference(
    folder: Path, prompts: list[list[int]], to: str | None, head: bool, dtype: str
) -> np.ndarray:
    """Hugging Face's log-probabilities [prompts, n-1]; no TF32, attention without fused kernels."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.dequantised import rounded_inputs

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    model.eval().to("cuda" if engines.on_gpu() else "cpu")
    with rounded_inputs(model, to, head=head):
        return engines.hugging_face(model, prompts, 4, "float64").astype(np.float64)


if __name__ == "__main__":
    main()
