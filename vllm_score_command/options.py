"""The options of the commands: their names, defaults and help.

For argparse, without vLLM: help appears at once. The engine's options are vLLM's own.
"""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup

ENGINE = """\
engine:
  every engine option of vLLM works, too, e.g. --dtype, --quantization, --tokenizer, --revision,
  --trust-remote-code, --tensor-parallel-size (-tp), --pipeline-parallel-size (-pp),
  --gpu-memory-utilization, --max-num-seqs, --max-num-batched-tokens, --kv-cache-dtype,
  --hf-overrides, --load-format, --enforce-eager, or --config FILE.yaml with options.
  --help=all shows all of them, --help=listgroup their groups, --help=ModelConfig those of a group,
  --help=cache those with that word.

  Other than in vLLM, if not given: --max-model-len is as long as the texts or windows need; on a
  CPU nothing is compiled, the KV cache takes a few windows and at most a quarter of the free
  memory, and one worker runs in this process; the model made on this machine runs in float32."""
FILES = "plain or compressed (gzip, bz2, xz, zstd, lz4)"


def perplexity(parser: ArgumentParser) -> None:
    """The options of `vllm-score perplexity`."""
    parser.description = """\
Perplexity of a model on a text, in sliding windows, from the exact log-probability of every token.

  vllm-score perplexity                          a small model made here, on text it has not seen
  vllm-score perplexity MODEL --file TEXT.txt    your model and text
  vllm-score perplexity MODEL --dataset wikitext --dataset-config wikitext-2-raw-v1 \\
      --convention all                           as published"""
    add_model(parser)
    text = parser.add_argument_group("Text")
    text.add_argument(
        "--dataset",
        metavar="NAME",
        help="dataset of the Hugging Face Hub, e.g. wikitext, or a folder with a saved one",
    )
    text.add_argument(
        "--dataset-config",
        metavar="CONFIG",
        help="configuration of the dataset, e.g. wikitext-2-raw-v1",
    )
    text.add_argument("--split", metavar="NAME", help="split of the dataset (default: test)")
    text.add_argument("--text", metavar="TEXT", help="the text itself")
    add_files(
        text, f"a text, or .jsonl, .json, .csv, .tsv, .parquet with a document per row, {FILES}"
    )
    text.add_argument(
        "--text-column", metavar="NAME", help="column that holds the text (default: text)"
    )
    add_skip_empty(text, "whose text is null, missing or empty")
    text.add_argument(
        "--separate-documents",
        action="store_true",
        help="score each document by itself, instead of all joined by an empty line",
    )
    text.add_argument(
        "--limit", type=int, metavar="TOKENS", help="score only the first tokens of the text"
    )
    windows = parser.add_argument_group("Windows")
    windows.add_argument(
        "--context-length",
        type=int,
        default=2048,
        metavar="TOKENS",
        help="tokens of a window: what the model sees at once (default: %(default)s)",
    )
    windows.add_argument(
        "--stride",
        type=int,
        default=512,
        metavar="TOKENS",
        help="tokens scored in each window; those before are context (default: %(default)s)",
    )
    windows.add_argument(
        "--bos",
        default="auto",
        metavar="RULE",
        help="BOS token: auto (what the tokenizer does), start (of the text), window (each), never "
        "(default: %(default)s)",
    )
    windows.add_argument(
        "--convention",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also compute the perplexity of another tool: hf-stride, gptq, llama.cpp, exllamav3, "
        "lm-eval-hf, lm-eval-vllm, or all; gptq:4096 for other windows; may be repeated",
    )
    store = parser.add_argument_group("Store")
    store.add_argument(
        "--store",
        metavar="DIR",
        help="keep the scores here as they come, so that a killed run can go on",
    )
    store.add_argument("--resume", action="store_true", help="go on with the run in --store")
    add_output(
        parser,
        ("FILE.parquet", "write a row per token: position, token id, text, log-probability"),
        ("FILE.png|.html", "draw the loss along the text, its distribution, the hardest tokens"),
    )
    parser.epilog = ENGINE


def sequence(parser: ArgumentParser) -> None:
    """The options of `vllm-score sequence`."""
    parser.description = """\
Log-probability of sequences after contexts, from the exact score of every token.

  vllm-score sequence MODEL --context "The capital of France is" --target " Paris" \\
      --target " London"
  vllm-score sequence MODEL --file pairs.csv --output scores.csv"""
    add_model(parser)
    pairs = parser.add_argument_group("Pairs")
    pairs.add_argument(
        "--context",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="text before the sequence; may be empty; may be repeated",
    )
    pairs.add_argument(
        "--target",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="sequence to score, exactly as it goes on: 'Paris' and ' Paris' are two; may be "
        "repeated, and every target is scored after every context",
    )
    add_files(pairs, f".csv, .tsv, .jsonl, .json or .parquet with a pair per row, {FILES}")
    pairs.add_argument(
        "--context-column",
        metavar="NAME",
        help="column with the contexts: texts, or (not in CSV) lists of chat messages "
        "(default: context)",
    )
    pairs.add_argument(
        "--target-column", metavar="NAME", help="column with the sequences (default: target)"
    )
    add_skip_empty(pairs, "without a context or with an empty target")
    pairs.add_argument(
        "--chat",
        action="store_true",
        help="take each context for a user's message, and each target for the answer, through the "
        "model's chat template",
    )
    pairs.add_argument(
        "--boundary",
        default="spanning",
        metavar="RULE",
        help="for a token that holds the end of the context and the beginning of the target: "
        "spanning (score from its start), strict (refuse), separate (tokenise apart) "
        "(default: %(default)s)",
    )
    add_output(
        parser,
        ("FILE.csv|.jsonl|.parquet", "write a row per pair, with each token's log-probability"),
    )
    parser.epilog = ENGINE


def eig(parser: ArgumentParser) -> None:
    """The options of `vllm-score eig`; those of the rules that come with it."""
    parser.description = """\
Let a model reason about questions as long as one more step is expected to tell more about the
answer than it costs.

  vllm-score eig                             additions, by a small model made on this machine
  vllm-score eig MODEL --file questions.jsonl --output traces.jsonl --plot traces.html"""
    add_model(parser)
    questions = parser.add_argument_group("Questions")
    questions.add_argument(
        "--question",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="may be repeated",
    )
    add_files(questions, f".jsonl, .json, .csv, .tsv or .parquet with a question per row, {FILES}")
    for name, text in {
        "question": "questions: texts, or (not in CSV) lists of chat messages (default: question)",
        "answer": "right answers, to count what is correct (default: answer, where there is one)",
        "choices": "a list of candidate answers for each question",
    }.items():
        questions.add_argument(f"--{name}-column", metavar="NAME", help=f"column with the {text}")
    add_skip_empty(questions, "whose question is null, missing or empty")
    questions.add_argument(
        "--chat",
        action="store_true",
        help="take each question for a user's message, through the model's chat template",
    )
    # None where they are not given; the rule and the reasoning check and convert them.
    stop = parser.add_argument_group("When to stop")
    stop.add_argument(
        "--scaler",
        default="expected_information_gain_reasoning",
        metavar="NAME",
        help="the rule: expected_information_gain_reasoning, entropy_threshold_reasoning or "
        "fixed_budget_reasoning (default: %(default)s)",
    )
    for name, metavar, text in (
        ("beam-size", "N", "number of candidate answers; a whole number from 1 to 20 (default: 8)"),
        (
            "sample-length",
            "N",
            "length of a step and of a continuation, tokens; a whole number from 1 to 512 "
            "(default: 64)",
        ),
        (
            "temperature",
            "X",
            "temperature of the continuations; a number from 0.1 to 2 (default: 1.0)",
        ),
        (
            "top-p",
            "X",
            "probability mass that continuations are sampled from; a number from 0.1 to 1 "
            "(default: 0.9)",
        ),
        (
            "max-computation-time",
            "X",
            "time limit of a decision, seconds; a number from 1 to 300 (default: 30.0)",
        ),
        (
            "lambda-cost",
            "X",
            "cost of one more step, nats; a number from 0 to 10 (default: 0.05)",
        ),
        (
            "mc-samples",
            "N",
            "continuations sampled for a forecast; a whole number from 1 to 20 (default: 5)",
        ),
        (
            "estimator",
            "TEXT",
            "estimator of the gain; one of entropy_difference, mutual_information "
            "(default: entropy_difference)",
        ),
        (
            "entropy-threshold",
            "X",
            "entropy to stop at, nats; a number from 0 to 10 (default: 0.5)",
        ),
        (
            "fixed-budget",
            "N",
            "length of the reasoning, tokens; a whole number from 0 to 1,000,000 (default: 256)",
        ),
    ):
        stop.add_argument(f"--{name}", metavar=metavar, help=text)
    stop.add_argument(
        "--strict",
        action="store_true",
        help="refuse values out of range, instead of taking the nearest one",
    )
    answers = parser.add_argument_group("Answers")
    answers.add_argument(
        "--candidates",
        metavar="NAME",
        help="where candidate answers come from: beam or sampled (the model's own, after the cue), "
        "numeric or boxed (what its reasoning says) (default: beam)",
    )
    answers.add_argument(
        "--answer-cue",
        metavar="TEXT",
        help=r"asks for the answer, after the reasoning; \n is a line break "
        r"(default: '\n\nThe answer is: ')",
    )
    answers.add_argument(
        "--answer-end",
        metavar="TEXT",
        help="ends an answer; '' for nothing, EOS for the end-of-sequence token "
        r"(default: '\n')",
    )
    answers.add_argument(
        "--length-normalization",
        metavar="UNIT",
        help="divide the log-probability of an answer by its tokens or bytes; or none "
        "(default: none)",
    )
    reasoning = parser.add_argument_group("Reasoning")
    reasoning.add_argument(
        "--decide-at",
        metavar="PLACE",
        help="step: before every sample_length tokens; end: only where the model ends its "
        "reasoning by itself (budget forcing) (default: step)",
    )
    reasoning.add_argument(
        "--max-tokens-thinking",
        type=int,
        metavar="N",
        help="tokens of reasoning at most, with what is inserted (default: 1024)",
    )
    reasoning.add_argument(
        "--thinking-n-ignore",
        type=int,
        metavar="N",
        help="how often the model is told to go on where it ends its reasoning and a step pays "
        "(default: 4)",
    )
    reasoning.add_argument(
        "--think-end",
        action="extend",
        nargs="+",
        metavar="TEXT",
        help="text that ends the reasoning, e.g. </think>; may be repeated",
    )
    reasoning.add_argument(
        "--concurrency",
        type=int,
        default=32,
        metavar="N",
        help="questions side by side (default: %(default)s)",
    )
    add_output(
        parser,
        ("FILE.jsonl", "write a trace per line: each decision, its candidates, the reasoning"),
        ("FILE.html|.png|.svg|.pdf", "draw entropy and expected gain along each trace"),
    )
    parser.epilog = (
        ENGINE + "\n  --seed is also of what is sampled, and of the questions made here."
    )


def doctor(parser: ArgumentParser) -> None:
    """The options of `vllm-score doctor`."""
    parser.description = """\
Would this installation score, and with what: versions, patches and kernels.

Starts a tiny engine in its own process, asks every process for its state, and compares a few scores
with Hugging Face. Exit code 1 if scores would be refused or are wrong."""
    parser.add_argument(
        "--quick", action="store_true", help="look at this process only; start no engine"
    )
    add_output(parser)


def add_output(
    parser: ArgumentParser,
    rows: tuple[str, str] | None = None,
    plot: tuple[str, str] | None = None,
) -> None:
    """The options of what is printed and written.

    Args:
        rows: file names and help of `--output`, where there is one.
        plot: those of `--plot`.
    """
    group = parser.add_argument_group("Output")
    group.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, on standard output"
    )
    for option, texts in (("--output", rows), ("--plot", plot)):
        if texts is not None:
            group.add_argument(option, metavar=texts[0], help=texts[1])
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")
    group.add_argument(
        "--debug",
        action="store_true",
        help="show vLLM's log, and the whole traceback of an error",
    )


def add_model(parser: ArgumentParser) -> None:
    """MODEL, and how much memory it takes."""
    parser.add_argument(
        "named_model",
        nargs="?",
        metavar="MODEL",
        help="name or folder of the model (or --model MODEL); without one: a small model made on "
        "this machine",
    )
    parser.add_argument(
        "--low-memory", action="store_true", help="small batches and a small KV cache"
    )


def add_files(group: _ArgumentGroup, kinds: str) -> None:
    """`--file`, for files of these kinds."""
    group.add_argument(
        "--file",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"{kinds}; several: --file A B C",
    )


def add_skip_empty(group: _ArgumentGroup, rows: str) -> None:
    """`--skip-empty`, for rows as described."""
    group.add_argument(
        "--skip-empty", action="store_true", help=f"leave out rows {rows}, and say how many"
    )
