"""The options that programs for perplexity share: their names, and what they say of themselves."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

TEXT, WINDOWS, ENGINE, LONG, OUTPUT = "Text", "Windows", "Engine", "Long runs", "Output"
FILE = "--file"


class ManyFilesCommand(typer.core.TyperCommand):
    """A command whose `--file a b c` names three files, as a shell's pattern is expanded.

    The words that follow a file's name are taken as long as they are files, so that MODEL may
    stand there, too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        found: list[str] = []
        rest = iter(args)
        after_file = False
        for word in rest:
            if word == "--":
                found += [word, *rest]
                break
            if word == FILE:
                found += [word, *islice(rest, 1)]
                after_file = True
            elif after_file and _is_file(word):
                found += [FILE, word]
            else:
                found.append(word)
                after_file = word.startswith(FILE + "=")
        return super().parse_args(ctx, found)


def _is_file(word: str) -> bool:
    # A model can be a single file, too.
    return not word.startswith("-") and Path(word).is_file() and not word.endswith(".gguf")


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Name or folder of the model. Without one: a small model made on this machine.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The same as MODEL.", show_default=False),
]

Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="NAME",
        help="Dataset of the Hugging Face Hub, as wikitext, or a folder with a saved one.",
        rich_help_panel=TEXT,
    ),
]
DatasetConfig = Annotated[
    str | None,
    typer.Option(
        "--dataset-config",
        metavar="CONFIG",
        help="Configuration of the dataset, as wikitext-2-raw-v1.",
        rich_help_panel=TEXT,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help="Split of the dataset.",
        show_default="test",
        rich_help_panel=TEXT,
    ),
]
DirectText = Annotated[
    str | None,
    typer.Option("--text", metavar="TEXT", help="The text itself.", rich_help_panel=TEXT),
]
File = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        metavar="PATH",
        help="Text file, or .jsonl, .json, .csv, .tsv, .parquet with a document a row, plain or "
        "compressed (gzip, bz2, xz, zstd, lz4); - for standard input. Several: --file A B C.",
        rich_help_panel=TEXT,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Column that holds the text.",
        show_default="text",
        rich_help_panel=TEXT,
    ),
]
SkipEmpty = Annotated[
    bool,
    typer.Option(
        "--skip-empty",
        help="Leave out rows whose text is null, missing or empty, and say how many.",
        rich_help_panel=TEXT,
    ),
]
SeparateDocuments = Annotated[
    bool,
    typer.Option(
        "--separate-documents",
        help="Score each document by itself, instead of all joined by an empty line.",
        rich_help_panel=TEXT,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="TOKENS",
        help="Score only the first tokens of the text.",
        rich_help_panel=TEXT,
    ),
]

ContextLength = Annotated[
    int,
    typer.Option(
        "--context-length",
        metavar="TOKENS",
        help="Tokens of a window: what the model sees at once.",
        rich_help_panel=WINDOWS,
    ),
]
Stride = Annotated[
    int,
    typer.Option(
        "--stride",
        metavar="TOKENS",
        help="Tokens scored in each window; those before them are context.",
        rich_help_panel=WINDOWS,
    ),
]
Bos = Annotated[
    str,
    typer.Option(
        "--bos",
        metavar="RULE",
        help="BOS token: auto (as the tokenizer does), start (of the text), window (each), never.",
        rich_help_panel=WINDOWS,
    ),
]
Conventions = Annotated[
    list[str] | None,
    typer.Option(
        "--convention",
        metavar="NAME",
        help="Also compute the perplexity as another tool does: hf-stride, gptq, llama.cpp, "
        "exllamav3, lm-eval-hf, lm-eval-vllm, or all; gptq:4096 for other windows. May be "
        "repeated.",
        rich_help_panel=WINDOWS,
    ),
]

Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, bfloat16, float16 or float32.",
        metavar="DTYPE",
        rich_help_panel=ENGINE,
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        "-q",
        metavar="METHOD",
        help="As vLLM's; only needed where the model's own configuration does not say it.",
        rich_help_panel=ENGINE,
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        help="GPUs to spread the model over.",
        rich_help_panel=ENGINE,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs", metavar="N", help="Windows in a batch at most.", rich_help_panel=ENGINE
    ),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        metavar="N",
        help="Tokens in a batch at most.",
        rich_help_panel=ENGINE,
    ),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="Share of the GPU's memory that vLLM may take.",
        rich_help_panel=ENGINE,
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="Compile nothing (as always on a CPU).",
        rich_help_panel=ENGINE,
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Small batches and a small KV cache.",
        rich_help_panel=ENGINE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model.",
        rich_help_panel=ENGINE,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="NAME",
        help="Branch, tag or commit of the model.",
        rich_help_panel=ENGINE,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="Tokenizer other than the model's own.",
        rich_help_panel=ENGINE,
    ),
]

StoreDirectory = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Keep the scores here as they come, so that a killed run can go on.",
        rich_help_panel=LONG,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run in --store.", rich_help_panel=LONG),
]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON, and nothing else, on standard output.",
        rich_help_panel=OUTPUT,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE.parquet",
        help="Write one row a token: position, token id, text, log-probability, window.",
        rich_help_panel=OUTPUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.png|.html",
        help="Draw the loss along the text, its distribution and the hardest tokens.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="No progress on standard error.", rich_help_panel=OUTPUT),
]


def show_everything(wanted: bool) -> bool:
    """For the rest of the program, errors come with their tracebacks and vLLM's log is shown."""
    from vllm.score.launch.start import DEBUG

    if wanted:
        DEBUG.set(True)
    return wanted


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show vLLM's log, and the whole traceback of an error.",
        callback=show_everything,
        is_eager=True,
        rich_help_panel=OUTPUT,
    ),
]
