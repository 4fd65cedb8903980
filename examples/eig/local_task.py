"""A model and a task of lm-eval that need no network: additions, made on this machine.

    python examples/eig/local_task.py FOLDER [--problems 32] [--seed 1]

writes FOLDER/additions.yaml and its questions, for `lm_eval --include_path FOLDER --tasks
additions`, and prints the folder of a small model that has learned additions (made on the first
call, under a minute on one core).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.additions import additions_model, random_problems, write_questions
from vllm_score_command import one_line_errors

NAME = "additions"
# The answer is the last number, after the cue or at the end of the sums.
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: 96
filter_list:
  - name: last_number
    filter:
      - function: regex
        regex_pattern: "([0-9]+)"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_task(folder: Path, problems: int, seed: int) -> None:
    """Write the task and its questions.

    Raises:
        ScoreModeError: fewer than one problem.
    """
    if problems < 1:
        raise ScoreModeError(f"--problems is {problems}; it must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.absolute() / f"{NAME}.jsonl"
    write_questions(data, random_problems(problems, seed=seed))
    (folder / f"{NAME}.yaml").write_text(TASK.format(name=NAME, data=data), encoding="utf-8")


def local_task(folder: Path, problems: int, seed: int) -> None:
    """Write a task of additions for lm-eval, and print the folder of a model for it."""
    write_task(folder, problems, seed)
    print(additions_model().directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=local_task.__doc__)
    parser.add_argument("folder", type=Path, help="where the task is written")
    parser.add_argument("--problems", type=int, default=32, help="number of questions")
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    with one_line_errors(parser.prog):
        local_task(**vars(parser.parse_args()))
