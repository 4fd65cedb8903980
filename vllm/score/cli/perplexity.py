"""`vllm-score perplexity`: the perplexity of a model on a text."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vllm.score.cli import options

if TYPE_CHECKING:
    from vllm.score.perplexity.result import PerplexityResult
    from vllm.score.report.baseline import Baseline
    from vllm.score.tiny.embedded import EmbeddedModel


def perplexity(
    model: options.ModelArgument = None,
    model_option: options.Model = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    text: options.DirectText = None,
    file: options.File = None,
    text_column: options.TextColumn = None,
    skip_empty: options.SkipEmpty = False,
    separate_documents: options.SeparateDocuments = False,
    limit: options.Limit = None,
    context_length: options.ContextLength = 2048,
    stride: options.Stride = 512,
    bos: options.Bos = "auto",
    convention: options.Conventions = None,
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
    store: options.StoreDirectory = None,
    resume: options.Resume = False,
    as_json: options.Json = False,
    output: options.Output = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Perplexity of a model on a text, in sliding windows, from the exact log-probability of
    every token.

    Without arguments: a small model made on this machine, on text that it has not seen.

    With a model:  vllm-score perplexity MODEL --file TEXT.txt

    As published:  vllm-score perplexity MODEL --dataset wikitext
    --dataset-config wikitext-2-raw-v1 --convention all
    """
    from vllm.score.armed import require_score_mode
    from vllm.score.cli import checks
    from vllm.score.cli.engine import open_llm, quieten
    from vllm.score.cli.hub import load_tokenizer, longest_context, model_config
    from vllm.score.cli.sources import TextOptions
    from vllm.score.cli.streams import results_stream
    from vllm.score.data import file_source
    from vllm.score.launch.steps import long_step, shows_bars

    conventions = convention or []
    model = checks.one_model(model, model_option)
    texts = TextOptions(dataset, dataset_config, split, text, file or [], text_column, skip_empty)
    checks.check_sizes(
        model,
        context_length=context_length,
        stride=stride,
        bos=bos,
        conventions=conventions,
        limit=limit,
        tensor_parallel_size=tensor_parallel_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    checks.check_store(store, resume)
    checks.check_engine(dtype, gpu_memory_utilization)
    if model is None:
        checks.check_no_model(quantization=quantization, tokenizer=tokenizer, revision=revision)
    checks.check_output("--output", output, (".parquet",), texts.files)
    checks.check_output("--plot", plot, (".png", ".html"), texts.files)
    settings: dict[str, Any] = {
        "context_length": context_length,
        "stride": stride,
        "bos": bos,
        "separator": None if separate_documents else "\n\n",
        "conventions": conventions,
        "max_tokens": limit,
    }
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}

    with results_stream() as results:
        quieten()
        require_score_mode()
        embedded = None
        if texts.given or model is not None:
            source = texts.open()
            checks.check_text(source, limit)
        if model is None:
            from vllm.score.tiny.embedded import embedded_model

            embedded = embedded_model(progress=not quiet)
            model = str(embedded.directory)
            # vLLM's "auto" would round its float32 weights to bfloat16.
            dtype = "float32" if dtype == "auto" else dtype
            if not texts.given:
                source = file_source(embedded.held_out_text)
        longest = longest_context(model_config(model, **loading))
        checks.check_fits_model(longest, model, context_length, conventions)
        if tokenizer is None:
            loaded = load_tokenizer(model, **loading)
        else:  # the revision is the model's
            loaded = load_tokenizer(tokenizer, **{**loading, "revision": None})
        checks.check_job(source, loaded, **settings)

        from vllm.score.perplexity import perplexity as run
        from vllm.score.perplexity.conventions import longest_prompt, longest_window

        llm = open_llm(
            model,
            context_length=longest_prompt(conventions, context_length),
            read=longest_window(conventions, context_length),
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
        bars = shows_bars(not quiet)
        with long_step(f"Scoring {source.name}", "Scored", not quiet and not bars):
            result = run(llm, source, store=store, resume=resume, use_tqdm=bars, **settings)
        _report(result, _baselines(result, embedded), results, as_json=as_json)
        _write_files(result, output, plot, quiet=quiet)


def _baselines(result: PerplexityResult, embedded: EmbeddedModel | None) -> list[Baseline]:
    """Guesses without a model, on the same tokens; known for the embedded model only, whose
    training text is at hand."""
    if embedded is None:
        return []
    from vllm.score.report.baseline import Baseline

    nats = 0.0
    for batch in result.batches():
        ids = batch.column("token_id").to_numpy()
        nats += len(ids) * math.log(embedded.unigram_perplexity(ids))
    unigram = math.exp(nats / result.provenance.scored_tokens)
    return [
        Baseline("unigram", "by the frequencies of the tokens in the training text", unigram),
        Baseline("uniform", "every token as likely as another", embedded.uniform_perplexity()),
    ]


def _report(
    result: PerplexityResult, baselines: list[Baseline], stream: TextIO, *, as_json: bool
) -> None:
    if as_json:
        from vllm.score.report.machine import to_json

        print(to_json(result, baselines), file=stream, flush=True)
        return
    from rich.console import Console

    from vllm.score.report.table import print_result

    print_result(result, Console(file=stream, highlight=False), baselines)
    stream.flush()


def _write_files(
    result: PerplexityResult, output: Path | None, plot: Path | None, *, quiet: bool
) -> None:
    if output is not None:
        result.write_parquet(output)
    if plot is not None:
        from vllm.score.report.plots import write_plot

        write_plot(result, plot)
    for path in (output, plot):
        if path is not None and not quiet:
            print(f"wrote {path}", file=sys.stderr)
