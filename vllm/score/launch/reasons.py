"""The root cause of an engine's failure, from its exception and its log, and what to do."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

MOST_CHARACTERS = 400

# What a process says when another one failed.
_ECHOES = re.compile(
    r"see (root cause|stack trace)|initialization failed due to an exception|"
    r"EngineCore encountered an issue|cancelled|Connection (reset|closed)|Broken pipe|"
    r"bootstrapping phase|Executor failed",
    re.IGNORECASE,
)
# Before a line of another process, or of vLLM's log.
_PREFIX = re.compile(
    r"^(\([^()]*pid=\d+\) ?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] ?)?"
)
# Its lines of code, the exception, the further lines of its message; and the next three lines.
_TRACEBACK = re.compile(
    r"^ *Traceback \(most recent call last\):\n((?:(?: .*)?\n)*)"
    r"(?:[A-Za-z_]\w*\.)*([A-Z]\w*)(?:: (.*))?$((?:\n .*)*)(?=((?:\n.*){0,3}))",
    re.MULTILINE,
)
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
# Exceptions whose names add nothing to what they say.
_NAMELESS = ("AssertionError", "Exception", "OSError", "RuntimeError", "ValueError")
_SIGNAL = re.compile(r"Failed core proc\(s\): \{'(\w+)': -(\d+)")

# What is said, and what helps. {option} is spelled as the caller's users do.
_REMEDIES = {
    r"couldn't connect to|Invalid repository ID|outgoing traffic|offline mode|"
    r"not a valid model identifier": "there is no such folder or model on this machine, and the "
    "Hugging Face Hub cannot be reached (or HF_HUB_OFFLINE is set) or does not know it; fetch it "
    "elsewhere and name its folder, or set HF_ENDPOINT to a mirror",
    r"not a valid JSON|is not a multiple of the number of attention heads|expected \w+, got|"
    r"model type `": "mend its config.json, or fetch it again",
    r"Cannot find any model weights": "the folder has a configuration and no weights; fetch the "
    "model's .safetensors files, too",
    r"deserializing header|SafetensorError|invalid header|incomplete metadata": "a file of weights "
    "is damaged or cut short (or a Git LFS pointer); fetch it again",
    r"not initialized from checkpoint|size of tensor .* must match|shape mismatch|"
    r"loaded_weight\.|param_data\.shape|size mismatch": "config.json and the weights are not of "
    "one model; fetch both again",
    r"allowed NUMA nodes to bind|doesn't match local world size": "on a CPU each worker needs "
    "cores of its own: set VLLM_CPU_OMP_THREADS_BIND to their numbers, e.g. '0-3|4-7' for two "
    "workers, or to 'nobind', or lower {tensor_parallel_size}",
    r"(head_dim|head_size)[ =]\S+.*(isa|not supported|unsupported)|"
    r"Unsupported CPU attention": "vLLM has no attention for this size of heads on this device; "
    "use a GPU or another model",
    r"larger than the maximum number of|No available memory for the cache|KV cache is needed|"
    r"requested memory for kv|to serve at least one request": "give the KV cache more memory by "
    "{gpu_memory_utilization}, or shorten {max_model_len}",
    r"desired (CPU|GPU) memory utilization|less than desired": "lower {gpu_memory_utilization}, or "
    "end what uses the memory",
    r"out of memory|Cannot allocate memory|can't allocate memory|signal 9": "the memory ran out; "
    "lower {gpu_memory_utilization}, use a smaller {dtype} or {quantization}, or a machine with "
    "more memory",
    r"greater than the derived max_model_len|max_position_embeddings": "shorten {max_model_len} to "
    "what the model takes",
    r"World size .* is larger than the number of available GPUs|no GPU|"
    r"Total number of attention heads|"
    r"must be divisible by tensor parallel size": "change {tensor_parallel_size}",
    r"does not support.*--?runner generate|runner generate|"
    r"pooling models have no next-token": "score mode needs a model that generates text (a causal "
    "language model)",
    r"architectures? .* (are not supported|failed to be inspected|has no vLLM)|"
    r"not compatible with vLLM|not found in the forward method": "vLLM does not know this kind of "
    "model; name a causal language model that it lists as supported",
    r"Cannot find the config file for|Unknown quantization method|does not support .*quantiz|"
    r"[Qq]uantization method .* does not match": "leave {quantization} out, unless the model's "
    "files are of that kind",
    r"Failed to find a kernel that can implement|has no attribute '\w*(wna16|scaled_mm)|"
    r"(wna16|scaled_mm|fp8|nvfp4|marlin|int8).*(not supported|no kernel|requires)|"
    r"not supported (on|for) .*(CPU|platform|device)|"
    r"quantization is currently not supported": "vLLM has no product for these quantised weights "
    "on this device; use the unquantised model, or another device",
    r"Address already in use|EADDRINUSE": "a port is taken: end the program that uses it, or set "
    "VLLM_PORT to a free one",
    r"trust_remote_code": "add {trust_remote_code}, if you trust the code that comes with it",
    r"not supported.*dtype|dtype.*(not supported|is only supported)|"
    r"Bfloat16 is only supported": "choose another {dtype}",
}


def root_cause(error: BaseException, log: str = "") -> str:
    """The first cause in one line: of `error`, or of the processes that wrote `log`."""
    reason = _message(error)
    if _ECHOES.search(reason):
        ended = _SIGNAL.search(reason)
        reason = next(_logged(log), reason)
        if _ECHOES.search(reason) and ended:
            reason = f"the process {ended[1]} was ended by signal {ended[2]}"
    return _shortened(reason)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return _shortened(_message(error))


def remedy(reason: str, spell: Callable[[str], str] = str) -> str | None:
    """What helps against a cause, if that is known.

    Args:
        spell: how an argument of `vllm.LLM` is spelled where users give it.
    """
    for pattern, text in _REMEDIES.items():
        if re.search(pattern, reason, re.IGNORECASE):
            return re.sub(r"\{(\w+)\}", lambda match: spell(match[1]), text)
    return None


def unguarded_script_note(error: BaseException) -> str | None:
    """What to write in the program's script, where an engine process died of importing it.

    A process that is spawned (e.g. on a CPU, or once CUDA is initialised) runs the script again to
    find its functions, and one that starts an engine at once would start another one, and so on.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    spawned = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "spawn"
    if script is None or not spawned or "initialization failed" not in str(error):
        return None
    try:
        if "__main__" in Path(script).read_text(encoding="utf-8", errors="replace"):
            return None
    except OSError:
        return None
    return (
        f"vllm-score: vLLM's engine process imports {script} again, which starts another engine; "
        'put the code that makes the LLM below `if __name__ == "__main__":`'
    )


def _message(error: BaseException) -> str:
    """What an exception says: the message within pydantic's; the failed line of a bare assert."""
    details = getattr(error, "errors", None)
    if callable(details) and details():
        first = details()[0]
        if first["type"] != "value_error" and first["loc"]:
            return f"{first['loc'][-1]} is {first['input']!r:.60}: {first['msg']}"
        return str(first["msg"]).removeprefix("Value error, ")
    frames = traceback.extract_tb(error.__traceback__)
    return _worded(type(error).__name__, str(error), (frames[-1].line if frames else "") or "")


def _worded(name: str, message: str, code: str) -> str:
    """An exception; by its name, too, where that says something."""
    if message.strip():
        return message.strip() if name in _NAMELESS else f"{name}: {message.strip()}"
    return f"{name} at `{code}`" if code else name


def _logged(log: str) -> Iterator[str]:
    """What the tracebacks in a log end with, but for echoes, in their order.

    Of exceptions that caused each other the last comes first: it says more.
    """
    lines = "\n".join(_PREFIX.sub("", line) for line in log.splitlines())
    chain: list[str] = []
    for code, name, message, more, following in _TRACEBACK.findall(lines):
        said = " ".join(f"{message}{more}".split())
        if not _ECHOES.search(said):
            last = [line.strip() for line in code.splitlines() if line.strip(" ^~")][-1:]
            chain.append(_worded(name, said, "".join(last)))
        if not any(sentence in following for sentence in _CHAINED):
            yield from reversed(chain)
            chain = []


def _shortened(reason: str) -> str:
    """One line; long lists, e.g. of all quantisations, are cut; that of all models goes."""
    line = re.sub(r"\W+Supported architectures:.*", "", " ".join(reason.split())).rstrip(".:; ")
    if len(line) <= MOST_CHARACTERS:
        return line
    return line[:MOST_CHARACTERS].rsplit(" ", 1)[0] + " ..."
