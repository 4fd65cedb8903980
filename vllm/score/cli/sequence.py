"""`vllm-score sequence`: the probability of sequences after contexts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console

from vllm.score.armed import require_score_mode
from vllm.score.checks import check_name
from vllm.score.cli.inputs import check_output, read_pairs
from vllm.score.cli.model import Model
from vllm.score.launch.engine import long_step, say, shows_bars
from vllm.score.report.numbers import json_safe
from vllm.score.sequence import table
from vllm.score.sequence.boundary import RULES
from vllm.score.sequence.scorer import prepare_pairs, score_prepared
from vllm.score.tiny.embedded import embedded_model

_LEAST_LENGTH = 256


def sequence(options: Namespace, results: TextIO) -> None:
    """Score the pairs that the options name, and print and write the rows."""
    require_score_mode()
    progress = not options.quiet
    model = Model(options)
    output = check_output("output", options.output, table.WRITABLE, options.file)
    check_name("--boundary", options.boundary, RULES)
    pairs = read_pairs(options)
    model.read(lambda: embedded_model(progress=progress).directory)
    prepared = prepare_pairs(pairs.rows, model.tokenizer, options.boundary, pairs.names)
    longest = model.longest
    if longest is not None:
        prepared.check_length(longest, f"the most that {model.name!r} takes")
    needed = max(len(split.token_ids) for split in prepared.splits)
    llm = model.start(max(needed, min(_LEAST_LENGTH, longest or _LEAST_LENGTH)))
    bars = shows_bars(progress)
    with long_step(f"Scoring {len(prepared.splits)} pair(s)", "Scored", progress and not bars):
        rows = score_prepared(llm, prepared, use_tqdm=bars)
    _print(rows, pairs.notes, results, as_json=options.json)
    if output is not None:
        table.write_results(rows, output)
        say(f"wrote {output}", progress)


def _print(
    rows: Sequence[Mapping[str, Any]], notes: Sequence[str], stream: TextIO, *, as_json: bool
) -> None:
    if as_json:
        text = json.dumps(json_safe(rows), indent=2, ensure_ascii=False, allow_nan=False)
        print(text, file=stream, flush=True)
        for line in notes:
            print(line, file=sys.stderr)
        return
    console = Console(file=stream, highlight=False)
    console.print(table.results_table(rows))
    for line in (*table.notes(rows), *notes):
        console.print(line, markup=False)
    stream.flush()
