"""`vllm-score perplexity`: the perplexity of a model on a text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
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
    enforce_eager: options.EnforceEager = None,
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
) -> None:
    """Perplexity of a model on a text, in sliding windows, from the exact log-probability of
    every token.

    Without arguments: a small model made on this machine, on text that it has not seen.

    With a model:  vllm-score perplexity MODEL --file TEXT.txt

    As published:  vllm-score perplexity MODEL --dataset wikitext
    --dataset-config wikitext-2-raw-v1 --convention all
    """
    from vllm.score.cli import checks
    from vllm.score.cli.hub import longest_context, model_config
    from vllm.score.cli.sources import TextOptions
    from vllm.score.cli.streams import quiet_engine, results_stream

    conventions = convention or []
    model = _one_model(model, model_option)
    texts = TextOptions(dataset, dataset_config, split, text, file or [], text_column)
    checks.check_sizes(
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
    checks.check_output("--output", output, (".parquet",))
    checks.check_output("--plot", plot, (".png", ".html"))

    settings = {
        "context_length": context_length,
        "stride": stride,
        "bos": bos,
        "separator": None if separate_documents else "\n\n",
        "conventions": conventions,
        "max_tokens": limit,
    }

    with results_stream() as results:
        quiet_engine()
        embedded = None
        source = texts.open() if texts.given or model else None
        if model is None:
            embedded = embedded_model(progress=not quiet)
            model = str(embedded.directory)
            # vLLM's "auto" would round the float32 weights to bfloat16.
            dtype = "float32" if dtype == "auto" else dtype
            source = source or file_source(embedded.held_out_text)
        loaded = {"trust_remote_code": trust_remote_code, "revision": revision}
        limits = longest_context(model_config(model, **loaded))
        checks.check_fits_model(limits, model, context_length, conventions)
        checks.check_text(source)
        checks.check_job(source, _tokenizer(tokenizer or model, **loaded), **settings)
