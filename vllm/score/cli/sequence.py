"""`vllm-score sequence`: the probability of sequences after contexts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from vllm.score.cli import options

PAIRS = "Pairs"
# Tokens of a pair where neither tokenizer nor configuration can be read without the engine.
_UNKNOWN_LENGTH = 2048
_LEAST_LENGTH = 256

Context = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        metavar="TEXT",
        help="Text before the sequence; may be empty. May be repeated.",
        rich_help_panel=PAIRS,
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="TEXT",
        help="Sequence to score, exactly as it goes on: 'Paris' and ' Paris' are two. May be "
        "repeated; every target is scored after every context.",
        rich_help_panel=PAIRS,
    ),
]
File = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        metavar="PATH",
        help=".csv, .tsv, .jsonl, .json or .parquet with a pair a row, plain or compressed. "
        "Several: --file A B C.",
        rich_help_panel=PAIRS,
    ),
]
SkipEmpty = Annotated[
    bool,
    typer.Option(
        "--skip-empty",
        help="Leave out rows without a context or with an empty target, and say how many.",
        rich_help_panel=PAIRS,
    ),
]
ContextColumn = Annotated[
    str | None,
    typer.Option(
        "--context-column",
        metavar="NAME",
        help="Column with the contexts: texts, or (not in CSV) lists of chat messages.",
        show_default="context",
        rich_help_panel=PAIRS,
    ),
]
TargetColumn = Annotated[
    str | None,
    typer.Option(
        "--target-column",
        metavar="NAME",
        help="Column with the sequences.",
        show_default="target",
        rich_help_panel=PAIRS,
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Take each context as a user's message, and each target as the answer, through the "
        "model's chat template.",
        rich_help_panel=PAIRS,
    ),
]
Boundary = Annotated[
    str,
    typer.Option(
        "--boundary",
        metavar="RULE",
        help="A token that holds the end of the context and the beginning of the target: "
        "spanning (score from its start), strict (refuse), separate (tokenise apart).",
        rich_help_panel=PAIRS,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE.csv|.jsonl|.parquet",
        help="Write one row a pair, with the log-probability of each token.",
        rich_help_panel=options.OUTPUT,
    ),
]


def sequence(
    model: options.ModelArgument = None,
    model_option: options.Model = None,
    context: Context = None,
    target: Target = None,
    file: File = None,
    context_column: ContextColumn = None,
    target_column: TargetColumn = None,
    skip_empty: SkipEmpty = False,
    chat: Chat = False,
    boundary: Boundary = "spanning",
    dtype: options.Dtype = "auto",
    quantization: options.Quantization = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    enforce_eager: options.EnforceEager = False,
    low_memory: options.LowMemory = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.Json = False,
    output: Output = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Log-probability of sequences after contexts, from the exact score of every token.

    For example:  vllm-score sequence MODEL --context "The capital of France is"
    --target " Paris" --target " London"

    From a file:  vllm-score sequence MODEL --file pairs.csv --output scores.csv
    """
    from vllm.score.armed import require_score_mode
    from vllm.score.cli import checks
    from vllm.score.cli.engine import open_llm, quieten
    from vllm.score.cli.hub import load_tokenizer, longest_context, model_config
    from vllm.score.cli.pairs import PairOptions
    from vllm.score.cli.streams import results_stream
    from vllm.score.launch.steps import long_step, shows_bars
    from vllm.score.sequence.files import WRITABLE
    from vllm.score.sequence.hook import score_prepared

    model = checks.one_model(model, model_option)
    checks.check_positive(
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    checks.check_engine(dtype, gpu_memory_utilization)
    if model is None:
        checks.check_no_model(quantization=quantization, tokenizer=tokenizer, revision=revision)
    checks.check_output("--output", output, WRITABLE, [str(each) for each in file or []])
    given = PairOptions(
        context or [],
        target or [],
        file or [],
        context_column,
        target_column,
        chat,
        boundary,
        skip_empty,
    )
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}

    with results_stream() as results:
        quieten()
        require_score_mode()
        pairs = given.read()
        if model is None:
            from vllm.score.tiny.embedded import embedded_model

            model = str(embedded_model(progress=not quiet).directory)
            # vLLM's "auto" would round its float32 weights to bfloat16.
            dtype = "float32" if dtype == "auto" else dtype
        longest = longest_context(model_config(model, **loading))
        if tokenizer is None:
            loaded = load_tokenizer(model, **loading)
        else:  # the revision is the model's
            loaded = load_tokenizer(tokenizer, **{**loading, "revision": None})
        length = _UNKNOWN_LENGTH
        if loaded is not None:
            prepared = pairs.prepare(loaded)
            if longest is not None:
                prepared.check_length(longest, f"the most that {model!r} takes")
            needed = max(len(split.token_ids) for split in prepared.splits)
            length = max(needed, min(_LEAST_LENGTH, longest or _LEAST_LENGTH))
        llm = open_llm(
            model,
            context_length=length,
            dtype=dtype,
            quantization=quantization,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager or None,
            low_memory=low_memory,
            tokenizer=tokenizer,
            progress=not quiet,
            **loading,
        )
        if loaded is None:
            prepared = pairs.prepare(llm.get_tokenizer())
        bars = shows_bars(not quiet)
        with long_step(f"Scoring {len(prepared.splits)} pair(s)", "Scored", not quiet and not bars):
            rows = score_prepared(llm, prepared, use_tqdm=bars)
        _report(rows, pairs.notes, results, as_json=as_json)
        if output is not None:
            from vllm.score.sequence.files import write_results

            write_results(rows, output)
            if not quiet:
                print(f"wrote {output}", file=sys.stderr)


def _report(
    rows: list[dict[str, Any]], notes: Sequence[str], stream: TextIO, *, as_json: bool
) -> None:
    if as_json:
        from vllm.score.sequence import files

        text = json.dumps(files.as_json(rows), indent=2, ensure_ascii=False, allow_nan=False)
        print(text, file=stream, flush=True)
        for line in notes:
            print(line, file=sys.stderr)
        return
    from rich.console import Console

    from vllm.score.sequence import table

    console = Console(file=stream, highlight=False)
    console.print(table.results_table(rows))
    for line in (*table.notes(rows), *notes):
        console.print(line, markup=False)
    stream.flush()
