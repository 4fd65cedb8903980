"""`vllm-score perplexity`: the perplexity of a model on a text."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import TextIO

from rich.console import Console

from vllm.score.armed import require_score_mode
from vllm.score.checks import Count, check
from vllm.score.cli.inputs import check_output, check_text, check_writable, open_text
from vllm.score.cli.model import Model
from vllm.score.data import file_source
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import long_step, say, shows_bars
from vllm.score.perplexity import PerplexityResult, Settings, prepare, run_job
from vllm.score.perplexity import conventions as known
from vllm.score.report.table import Baseline, print_result, to_json
from vllm.score.tiny.embedded import EmbeddedModel, embedded_model


def perplexity(options: Namespace, results: TextIO) -> None:
    """Score the text that the options name, and print and write the figures."""
    require_score_mode()
    progress = not options.quiet
    model = Model(options)
    is_named = check_text(options)
    check("--limit", options.limit, Count | None)
    settings = Settings(
        context_length=options.context_length,
        stride=options.stride,
        bos=options.bos,
        separator=None if options.separate_documents else "\n\n",
        conventions=options.convention,
        max_tokens=options.limit,
    )
    sizes = settings.conventions, settings.context_length
    _check_store(options.store, options.resume)
    output = check_output("output", options.output, (".parquet",), options.file)
    plot = check_output("plot", options.plot, (".png", ".html"), options.file)

    embedded: list[EmbeddedModel] = []

    def make() -> Path:
        embedded.append(embedded_model(progress=progress))
        return embedded[0].directory

    source = open_text(options) if is_named or model.name is not None else None
    if source is not None and options.limit is None:
        source.check()
    model.read(make)
    source = source or file_source(embedded[0].held_out_text)
    if (most := model.longest) is not None:
        limit = f"the {most} tokens that {model.name!r} takes (max_position_embeddings)"
        known.check_fits(*sizes, most, limit)
    job = prepare(settings, source, model.tokenizer)
    llm = model.start(known.longest_prompt(*sizes), known.longest_window(*sizes))
    bars = shows_bars(progress)
    with long_step(f"Scoring {source.name}", "Scored", progress and not bars):
        result = run_job(llm, job, store=options.store, resume=options.resume, use_tqdm=bars)
    baselines = _baselines(result, embedded[0]) if embedded else []
    if options.json:
        print(to_json(result, baselines), file=results)
    else:
        print_result(result, Console(file=results, highlight=False), baselines)
    results.flush()
    if output is not None:
        result.write_parquet(output)
        say(f"wrote {output}", progress)
    if plot is not None:
        from vllm.score.report.plots import write_plot  # matplotlib takes a second

        write_plot(result, plot)
        say(f"wrote {plot}", progress)


def _check_store(name: str | None, resume: bool) -> None:
    """`--resume` needs a store; without it the store must be empty or new."""
    if name is None:
        if resume:
            raise ScoreModeError(
                "--resume is given without --store; name the directory of the run to go on with"
            )
        return
    store, said = Path(name), f"--store {name!r}"
    if store.exists() and not store.is_dir():
        raise ScoreModeError(f"{said} is a file; name a directory")
    if (store / "manifest.json").exists() and not resume:
        raise ScoreModeError(
            f"{said} already holds a run; add --resume to go on with it, or name another directory"
        )
    existing = next(folder for folder in (store, *store.absolute().parents) if folder.is_dir())
    check_writable(said, store, existing)


def _baselines(result: PerplexityResult, embedded: EmbeddedModel) -> list[Baseline]:
    """Guesses without a model, on the same tokens; known where the training text is at hand."""
    nats = 0.0
    for batch in result.batches():
        ids = batch.column("token_id").to_numpy()
        nats += len(ids) * math.log(embedded.unigram_perplexity(ids))
    unigram = math.exp(nats / result.provenance.scored_tokens)
    return [
        Baseline("unigram", "by the frequencies of the tokens in the training text", unigram),
        Baseline("uniform", "every token as likely as another", embedded.uniform_perplexity()),
    ]
