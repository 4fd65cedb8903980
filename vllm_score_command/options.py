"""The options of the commands: their names, defaults and help.

For argparse, without vLLM: help appears at once. The engine's options are vLLM's own.
"""

from __future__ import annotations

from argparse import ArgumentParser, _ActionsContainer
from collections.abc import Mapping
from typing import Any

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
WHOLE_NUMBERS = ("TOKENS", "N")  # in usages; every other value is a text


def add_options(group: _ActionsContainer, options: Mapping[str, str], **defaults: Any) -> None:
    """Add options to a parser, or to a group of one.

    Args:
        options: help by usage: `--flag`, `--option VALUE`, or `--option VALUE ...` for one that
            takes several values and may be repeated.
        defaults: values by the option's name; all others are None, False or empty.
    """
    for usage, text in options.items():
        name, *value = usage.split()
        kind: dict[str, Any] = {"action": "store_true"}
        if value:
            field = name.removeprefix("--").replace("-", "_")
            text += " (default: %(default)s)" if field in defaults else ""
            kind = {"metavar": value[0], "default": defaults.get(field)}
            if value[0] in WHOLE_NUMBERS:
                kind["type"] = int
            if value[1:]:
                kind |= {"action": "extend", "nargs": "+", "default": []}
        group.add_argument(name, help=text, **kind)


def perplexity(parser: ArgumentParser) -> None:
    """The options of `vllm-score perplexity`."""
    parser.description = """\
Perplexity of a model on a text, in sliding windows, from the exact log-probability of every token.

  vllm-score perplexity                          a small model made here, on text it has not seen
  vllm-score perplexity MODEL --file TEXT.txt    your model and text
  vllm-score perplexity MODEL --dataset wikitext --dataset-config wikitext-2-raw-v1 \\
      --convention all                           as published"""
    add_model(parser)
    text = {
        "--dataset NAME": "dataset of the Hugging Face Hub, e.g. wikitext, or a folder with a "
        "saved one",
        "--dataset-config CONFIG": "configuration of the dataset, e.g. wikitext-2-raw-v1",
        "--split NAME": "split of the dataset (default: test)",
        "--text TEXT": "the text itself",
        **files("a text, or .jsonl, .json, .csv, .tsv, .parquet with a document per row"),
        "--text-column NAME": "column that holds the text (default: text)",
        **skip_empty("whose text is null, missing or empty"),
        "--separate-documents": "score each document by itself, instead of all joined by an empty "
        "line",
        "--limit TOKENS": "score only the first tokens of the text",
    }
    add_options(parser.add_argument_group("Text"), text)
    windows = {
        "--context-length TOKENS": "tokens of a window: what the model sees at once",
        "--stride TOKENS": "tokens scored in each window; those before are context",
        "--bos RULE": "BOS token: auto (what the tokenizer does), start (of the text), window "
        "(each), never",
        "--convention NAME ...": "also compute the perplexity of another tool: hf-stride, gptq, "
        "llama.cpp, exllamav3, lm-eval-hf, lm-eval-vllm, or all; gptq:4096 for other windows; may "
        "be repeated",
    }
    group = parser.add_argument_group("Windows")
    add_options(group, windows, context_length=2048, stride=512, bos="auto")
    store = {
        "--store DIR": "keep the scores here as they come, so that a killed run can go on",
        "--resume": "go on with the run in --store",
    }
    add_options(parser.add_argument_group("Store"), store)
    add_output(
        parser,
        {
            "--output FILE.parquet": "write a row per token: position, token id, text, "
            "log-probability",
            "--plot FILE.png|.html": "draw the loss along the text, its distribution, the hardest "
            "tokens",
        },
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
    pairs = {
        "--context TEXT ...": "text before the sequence; may be empty; may be repeated",
        "--target TEXT ...": "sequence to score, exactly as it goes on: 'Paris' and ' Paris' are "
        "two; may be repeated, and every target is scored after every context",
        **files(".csv, .tsv, .jsonl, .json or .parquet with a pair per row"),
        "--context-column NAME": "column with the contexts: texts, or (not in CSV) lists of chat "
        "messages (default: context)",
        "--target-column NAME": "column with the sequences (default: target)",
        **skip_empty("without a context or with an empty target"),
        "--chat": "take each context for a user's message, and each target for the answer, through "
        "the model's chat template",
        "--boundary RULE": "for a token that holds the end of the context and the beginning of the "
        "target: spanning (score from its start), strict (refuse), separate (tokenise apart)",
    }
    add_options(parser.add_argument_group("Pairs"), pairs, boundary="spanning")
    rows = "write a row per pair, with each token's log-probability"
    add_output(parser, {"--output FILE.csv|.jsonl|.parquet": rows})
    parser.epilog = ENGINE


def eig(parser: ArgumentParser) -> None:
    """The options of `vllm-score eig`; those of the rules that come with it."""
    parser.description = """\
Let a model reason about questions as long as one more step is expected to tell more about the
answer than it costs.

  vllm-score eig                             additions, by a small model made on this machine
  vllm-score eig MODEL --file questions.jsonl --output traces.jsonl --plot traces.html"""
    add_model(parser)
    questions = {
        "--question TEXT ...": "may be repeated",
        **files(".jsonl, .json, .csv, .tsv or .parquet with a question per row"),
        "--question-column NAME": "column with the questions: texts, or (not in CSV) lists of chat "
        "messages (default: question)",
        "--answer-column NAME": "column with the right answers, to count what is correct (default: "
        "answer, where there is one)",
        "--choices-column NAME": "column with a list of candidate answers for each question",
        **skip_empty("whose question is null, missing or empty"),
        "--chat": "take each question for a user's message, through the model's chat template",
    }
    add_options(parser.add_argument_group("Questions"), questions)
    # None where they are not given; the rule checks and converts them.
    stop = {
        "--scaler NAME": "the rule: expected_information_gain_reasoning, "
        "entropy_threshold_reasoning or fixed_budget_reasoning",
        "--beam-size NUMBER": "number of candidate answers; a whole number from 1 to 20 "
        "(default: 8)",
        "--sample-length NUMBER": "length of a step and of a continuation, tokens; a whole number "
        "from 1 to 512 (default: 64)",
        "--temperature NUMBER": "temperature of the continuations; a number from 0.1 to 2 "
        "(default: 1.0)",
        "--top-p NUMBER": "probability mass that continuations are sampled from; a number from 0.1 "
        "to 1 (default: 0.9)",
        "--max-computation-time NUMBER": "time limit of a decision, seconds; a number from 1 to "
        "300 (default: 30.0)",
        "--lambda-cost NUMBER": "cost of one more step, nats; a number from 0 to 10 "
        "(default: 0.05)",
        "--mc-samples NUMBER": "continuations sampled for a forecast; a whole number from 1 to 20 "
        "(default: 5)",
        "--estimator NAME": "estimator of the gain; one of entropy_difference, mutual_information "
        "(default: entropy_difference)",
        "--entropy-threshold NUMBER": "entropy to stop at, nats; a number from 0 to 10 "
        "(default: 0.5)",
        "--fixed-budget NUMBER": "length of the reasoning, tokens; a whole number from 0 to "
        "1,000,000 (default: 256)",
        "--strict": "refuse values out of range, instead of taking the nearest one",
    }
    scaler = "expected_information_gain_reasoning"
    add_options(parser.add_argument_group("When to stop"), stop, scaler=scaler)
    answers = {
        "--candidates NAME": "where candidate answers come from: beam or sampled (the model's own, "
        "after the cue), numeric or boxed (what its reasoning says) (default: beam)",
        "--answer-cue TEXT": r"asks for the answer, after the reasoning; \n is a line break "
        r"(default: '\n\nThe answer is: ')",
        "--answer-end TEXT": "ends an answer; '' for nothing, EOS for the end-of-sequence token "
        r"(default: '\n')",
        "--length-normalization UNIT": "divide the log-probability of an answer by its tokens or "
        "bytes; or none (default: none)",
    }
    add_options(parser.add_argument_group("Answers"), answers)
    reasoning = {
        "--decide-at PLACE": "step: before every sample_length tokens; end: only where the model "
        "ends its reasoning by itself (budget forcing) (default: step)",
        "--max-tokens-thinking N": "tokens of reasoning at most, with what is inserted "
        "(default: 1024)",
        "--thinking-n-ignore N": "how often the model is told to go on where it ends its reasoning "
        "and a step pays (default: 4)",
        "--think-end TEXT ...": "text that ends the reasoning, e.g. </think>; may be repeated",
        "--concurrency N": "questions side by side",
    }
    add_options(parser.add_argument_group("Reasoning"), reasoning, concurrency=32)
    trace = "write a trace per line: each decision, its candidates, the reasoning"
    plot = "draw entropy and expected gain along each trace"
    add_output(parser, {"--output FILE.jsonl": trace, "--plot FILE.html|.png|.svg|.pdf": plot})
    parser.epilog = (
        ENGINE + "\n  --seed is also of what is sampled, and of the questions made here."
    )


def doctor(parser: ArgumentParser) -> None:
    """The options of `vllm-score doctor`."""
    parser.description = """\
Would this installation score, and with what: versions, patches and kernels.

Starts a tiny engine in its own process, asks every process for its state, and compares a few scores
with Hugging Face. Exit code 1 if scores would be refused or are wrong."""
    add_options(parser, {"--quick": "look at this process only; start no engine"})
    add_output(parser, {})


def add_output(parser: ArgumentParser, written: Mapping[str, str]) -> None:
    """The options of what is printed, and of the files that are written."""
    output = {
        "--json": "print JSON, and nothing else, on standard output",
        **written,
        "--quiet": "no progress on standard error",
        "--debug": "show vLLM's log, and the whole traceback of an error",
    }
    add_options(parser.add_argument_group("Output"), output)


def add_model(parser: ArgumentParser) -> None:
    """MODEL, and how much memory it takes."""
    parser.add_argument(
        "named_model",
        nargs="?",
        metavar="MODEL",
        help="name or folder of the model (or --model MODEL); without one: a small model made on "
        "this machine",
    )
    add_options(parser, {"--low-memory": "small batches and a small KV cache"})


def files(kinds: str) -> dict[str, str]:
    """`--file`, for files of these kinds."""
    return {"--file PATH ...": f"{kinds}, {FILES}; several: --file A B C"}


def skip_empty(rows: str) -> dict[str, str]:
    """`--skip-empty`, for rows as described."""
    return {"--skip-empty": f"leave out rows {rows}, and say how many"}
