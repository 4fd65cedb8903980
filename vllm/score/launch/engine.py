"""Start an `LLM` that fits a scoring run, or say in one sentence why it does not start.

Also what long steps print: their lines on standard error, and an engine's output in a file.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vllm.score.engine.configuration import (
    model_config,
    unsupported_configuration,
    with_room_for_one_more,
)
from vllm.score.errors import ScoreModeError, ScoreModeUnavailable
from vllm.score.launch.reasons import remedy, root_cause

if TYPE_CHECKING:
    from vllm import LLM

# Errors as they are, and all that vLLM logs.
DEBUG: ContextVar[bool] = ContextVar("DEBUG", default=False)

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"
CPU_WINDOWS_IN_CACHE = 16
CPU_CACHE_BYTES = (256 << 20, 16 << 30)

# Of the engine that runs, if it has processes of its own.
_log: LogFile | None = None


def flag(name: str) -> str:
    """How commands spell an argument of `vllm.LLM`."""
    return "the texts or windows" if name == "max_model_len" else "--" + name.replace("_", "-")


def open_llm(
    model: str,
    *,
    context_length: int,
    read: int | None = None,
    in_process: bool = True,
    low_memory: bool = False,
    progress: bool = True,
    **options: Any,
) -> LLM:
    """A running `vllm.LLM` for windows of `context_length` tokens.

    Args:
        model: name or folder.
        context_length: tokens of the longest prompt; becomes max_model_len.
        read: as many of them the model reads; one less where the last token is only predicted,
            and the model may have no position for it.
        in_process: run the engine in this process (only with one GPU or CPU). Requests then reach
            it in a fixed order, so a repeated run has the same batches and the same last bits.
        low_memory: few sequences at a time and a small KV cache.
        progress: whether to say on standard error that it starts, and when it runs.
        options: further arguments of `vllm.LLM`; None means its default here, which on a CPU is
            not vLLM's: see `for_cpu`.

    Raises:
        ScoreModeError: the model cannot be loaded as asked, or score mode does not serve such an
            engine.
    """
    from vllm import LLM

    quieten()
    # A model that only pools would start as one, and be refused at the first request.
    settings = {"use_tqdm_on_load": False, "runner": "generate"}
    settings |= {name: value for name, value in options.items() if value is not None}
    settings |= {"model": model, "max_model_len": context_length}
    if in_process and _workers(settings) == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if low_memory:
        settings.setdefault("max_num_seqs", 4)
        settings.setdefault("max_num_batched_tokens", max(context_length, 512))
    with starting(model, progress=progress, spell=flag):
        if read is not None and read < context_length:
            settings = with_room_for_one_more({**settings, "max_model_len": read})
        windows = 4 if low_memory else CPU_WINDOWS_IN_CACHE
        settings = {**for_cpu(settings, windows, in_process=in_process), **settings}
        _check_supported(settings)
        return LLM(**settings)


@contextmanager
def starting(
    model: str, *, progress: bool = True, spell: Callable[[str], str] = str
) -> Iterator[None]:
    """Within, a `vllm.LLM` starts, or what it needs is read: what is printed goes to a file.

    The file is named where the start fails. With `DEBUG`, or where the user has set
    VLLM_LOGGING_LEVEL to DEBUG or INFO, nothing is held back.

    Args:
        model: name or folder.
        progress: whether to say on standard error that it starts, and when it runs.
        spell: how the caller's users spell an argument of `vllm.LLM`.

    Raises:
        ScoreModeError: it does not start: the cause, what helps, and where the log is.
    """
    global _log
    with long_step(f"Starting vLLM with {model!r}", "vLLM is ready", progress):
        if DEBUG.get():
            yield
            return
        wanted = os.environ.get(LEVEL_VARIABLE, "").upper() in ("DEBUG", "INFO")
        log = None if wanted else LogFile()
        try:
            with nullcontext() if log is None else log.receiving():
                yield
        except ScoreModeError:
            raise
        except Exception as error:
            failed = f"vLLM does not start {model!r}"
            raise ScoreModeError(_sentence(failed, error, spell, log)) from None
        _log = log or _log  # its processes go on writing there


def read_model(settings: Mapping[str, Any]) -> Any:
    """vLLM's `ModelConfig` of an engine that is not started yet.

    Args:
        settings: arguments of `vllm.LLM`; `model` among them.

    Raises:
        ScoreModeError: what vLLM refuses in these settings or in the model's configuration.
    """
    with starting(settings["model"], progress=False, spell=flag):
        return model_config({"runner": "generate", **settings})


def for_cpu(
    settings: Mapping[str, Any], windows: int = CPU_WINDOWS_IN_CACHE, *, in_process: bool = True
) -> dict[str, Any]:
    """Defaults with which a model starts on a CPU with no variable or flag to set; else none.

    Nothing is compiled, which costs more than it brings. vLLM's own default of the KV cache is a
    share of the machine's reported memory, which fails where the memory is reported low or used by
    others: it holds `windows` contexts, within a quarter of the memory that is free. An engine
    process of its own would compete for the cores.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    # Stock prompt log-probabilities compile a kernel at run time; nothing of ours does.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    defaults: dict[str, Any] = {"enforce_eager": True}
    if "gpu_memory_utilization" not in settings and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        config = model_config(settings)
        # An upper estimate: all layers, no sharing between them, keys and values in float32.
        width = config.get_total_num_kv_heads() * config.get_head_size()
        a_token = 2 * config.get_total_num_hidden_layers() * width * 4
        wanted = windows * config.max_model_len * a_token
        low, high = CPU_CACHE_BYTES
        within = min(wanted, high, psutil.virtual_memory().available // 4)
        defaults["kv_cache_memory_bytes"] = max(low, within)
    if in_process and _workers(settings) == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        defaults["distributed_executor_backend"] = "uni"
    return defaults


def quieten() -> None:
    """Errors only from vLLM and its libraries, here and in child processes.

    The user's own VLLM_LOGGING_LEVEL counts more, and `DEBUG`.
    """
    if LEVEL_VARIABLE in os.environ:
        return
    logger = logging.getLogger("vllm")
    if DEBUG.get():
        os.environ[LEVEL_VARIABLE] = "DEBUG"
        logger.setLevel(logging.DEBUG)
        for handler in logger.handlers:  # made when vLLM was imported
            handler.setLevel(logging.DEBUG)
        return
    os.environ[LEVEL_VARIABLE] = "ERROR"
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def sentence_of(error: Exception) -> str:
    """One sentence for an error; what nobody has foreseen, e.g. of an engine that ends while it
    runs, is added with its traceback to the engine's log."""
    if isinstance(error, ScoreModeError | ScoreModeUnavailable):
        return str(error)
    log = _log or LogFile()
    return f"{_sentence('an unforeseen error', error, flag, log)} (--debug shows it)"


def _check_supported(settings: Mapping[str, Any]) -> None:
    """Raise ScoreModeError for an engine that score mode does not serve, before it starts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    # vLLM adds its own to some dicts among the settings.
    arguments = EngineArgs(**copy.deepcopy(dict(settings)))
    sentence = unsupported_configuration(arguments.create_engine_config(UsageContext.LLM_CLASS))
    if sentence is not None:
        raise ScoreModeError(sentence)


def _workers(settings: Mapping[str, Any]) -> int:
    kinds = ("tensor", "pipeline", "data")
    return math.prod(int(settings.get(f"{kind}_parallel_size") or 1) for kind in kinds)


def _sentence(
    failed: str, error: Exception, spell: Callable[[str], str], log: LogFile | None
) -> str:
    reason = root_cause(error, "" if log is None else log.keep(error))
    where = "see vLLM's log above" if log is None else f"the whole log is {log.path}"
    parts = (f"{failed}: {reason}", remedy(reason, spell), where)
    return "; ".join(part for part in parts if part)


@contextmanager
def long_step(begins: str, ended: str, progress: bool = True) -> Iterator[None]:
    """Print `begins`, and after the step `ended` and its time; nothing more where it fails.

    In a log, where no bar is drawn, these lines are all that a step shows.
    """
    say(begins, progress)
    started = time.perf_counter()
    yield
    say(f"{ended} ({time.perf_counter() - started:.1f} s)", progress)


def say(line: str, progress: bool) -> None:
    """Print a line on standard error, if progress is wanted."""
    if progress:
        print(line, file=sys.stderr, flush=True)


def shows_bars(progress: bool) -> bool:
    """Whether commands draw bars: on a terminal only, as a log keeps every state of a bar."""
    return progress and sys.stderr.isatty()


class LogFile:
    """A file that is deleted at the end of the program, unless something failed.

    Attributes:
        path: of it, in the folder for temporary files.
    """

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="vllm-score-", suffix=".log")
        os.close(descriptor)
        self.path = Path(name)
        atexit.register(self.path.unlink, missing_ok=True)

    def keep(self, error: BaseException) -> str:
        """Write down an error with its traceback, and leave the file; all that it holds."""
        atexit.unregister(self.path.unlink)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
        return self.path.read_text(encoding="utf-8", errors="replace")

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Within, standard output and standard error are this file, and vLLM logs its steps there.

        The file descriptors themselves, because compiled code and child processes write to them.
        Children that are started within keep writing to the file.
        """
        level = os.environ.get(LEVEL_VARIABLE)
        os.environ[LEVEL_VARIABLE] = "INFO"  # of children
        logger = logging.getLogger("vllm")
        own_level, own_handlers = logger.level, logger.handlers
        # Not vLLM's handler, which keeps the stream that was standard output at its import.
        handler = logging.FileHandler(self.path, encoding="utf-8")
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s")
        )
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        try:
            with _descriptors_to(self.path):
                yield
        finally:
            logger.setLevel(own_level)
            logger.handlers = own_handlers
            handler.close()
            if level is None:
                del os.environ[LEVEL_VARIABLE]
            else:
                os.environ[LEVEL_VARIABLE] = level


@contextmanager
def _descriptors_to(path: Path) -> Iterator[None]:
    _flush()
    kept: dict[int, int] = {}
    try:
        with path.open("a") as file:
            for number in (1, 2):
                with suppress(OSError):  # closed, as a daemon's may be
                    kept[number] = os.dup(number)
                    os.dup2(file.fileno(), number)
        yield
    finally:
        _flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
