"""Small tasks of every kind, their data sets as files of lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LETTERS, LONG, LAST_WORD, ROLLING, WRITING = (
    "score_letters",
    "score_long_options",
    "score_last_word",
    "score_rolling",
    "score_writing",
)
OPTIONS = ["A", "B", "C", "the"]

SENTENCES = [
    "Return the number of elements in the list",
    "The value is not an integer and",
    "Raise an error if the file",
    "A new object is created from",
    "If the argument is given then",
    "Characters such as é, 日本 and 🙂 are",
    "This method should be used in",
    "The default encoding of a text",
]

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
output_type: {output_type}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metadata:
  version: 1.0
"""


def write_tasks(folder: Path, hf: Any) -> None:
    """Write the tasks; `hf` tells which answers are greedy, for some to be."""
    folder.mkdir(parents=True)
    greedy = [_greedy_word(hf, f"Text: {s}") for s in SENTENCES]
    rows = [
        {
            "text": sentence,
            "label": i % 4,
            "long": [f"{sentence.lower()} {i}", "to be", "a list of names, é 🙂", "日本"],
            "word": greedy[i] if i % 2 else "default",
            "page": " ".join((SENTENCES[i:] + SENTENCES[:i]) * (1 + i % 3)),
        }
        for i, sentence in enumerate(SENTENCES)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    choices = "metric_list:\n  - metric: acc\n  - metric: acc_norm"

    def task(name: str, output_type: str, text: str, target: str, more: str) -> None:
        (folder / f"{name}.yaml").write_text(
            _TASK.format(
                name=name, data=data, output_type=output_type, text=text, target=target, more=more
            )
        )

    options = f"doc_to_choice: {json.dumps(OPTIONS)}\n{choices}"
    task(LETTERS, "multiple_choice", "Question: {{text}}?\\nAnswer:", "label", options)
    task(LONG, "multiple_choice", "{{text}}", "label", f'doc_to_choice: "{{{{long}}}}"\n{choices}')
    perplexity = "metric_list:\n  - metric: perplexity\n  - metric: acc"
    task(LAST_WORD, "loglikelihood", "Text: {{text}}", " {{word}}", perplexity)
    rolling = "metric_list:\n" + "\n".join(
        f"  - metric: {m}" for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    )
    task(ROLLING, "loglikelihood_rolling", "", "{{page}}", rolling)
    writing = (
        'metric_list:\n  - metric: exact_match\ngeneration_kwargs:\n  until: ["e"]\n'
        "  max_gen_toks: 12\n  do_sample: false"
    )
    task(WRITING, "generate_until", "Text: {{text}}", " {{word}}", writing)


def _greedy_word(hf: Any, context: str) -> str:
    """A word of one token that the model would write after the context."""
    import torch

    ids = torch.tensor([hf.tok_encode(context)])
    with torch.no_grad():
        order = hf.model(ids).logits[0, -1].argsort(descending=True)
    return str(hf.tok_decode([int(order[0])])).strip() or "default"
