"""The words of a command line: ours, vLLM's own, and scripts that complete both."""

from __future__ import annotations

import re
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from vllm.score.cli import completion, main
from vllm_score_command import options


def parse(*words: str, **defaults: Any) -> Namespace:
    from vllm.score.cli.parser import parse

    return parse(options.sequence, "vllm-score sequence", words, defaults)


def test_values_reach_us_as_they_are_written() -> None:
    values = ["-x.y", "--a_b.c d", "", " -O3", "-O3", "{'a': 1}"]
    given = [word for value in values for word in ("--target", value)]
    found = parse("M", *given, "--context_column", "a_b.c", "--low_memory")
    assert found.target == values
    assert (found.named_model, found.context_column, found.low_memory) == ("M", "a_b.c", True)
    assert found.engine == {}
    assert parse("--context=a", boundary="strict").boundary == "strict"
    with pytest.raises(SystemExit):
        parse("M", "--target", "--")


def test_engine_options_are_vllms_and_only_those_given(tmp_path: Path) -> None:
    assert parse("-tp", "2", "--no-enforce-eager", "--max_num_seqs", "8").engine == {
        "tensor_parallel_size": 2,
        "enforce_eager": False,
        "max_num_seqs": 8,
    }
    found = parse("--hf-overrides.rope_theta", "5", "--kv-cache-dtype", "fp8", "M").engine
    assert found == {"hf_overrides": {"rope_theta": 5}, "kv_cache_dtype": "fp8"}
    file = tmp_path / "options.yaml"
    file.write_text("pipeline-parallel-size: 2\nchat: true\ncontext: [a, b]\nload-format: dummy\n")
    read = parse("M", "--config", str(file), "--load-format", "auto")
    assert read.engine == {"pipeline_parallel_size": 2, "load_format": "auto"}
    assert (read.chat, read.context, read.named_model) == (True, ["a", "b"], "M")


def test_help_lists_ours_before_vllms(capsys: pytest.CaptureFixture[str]) -> None:
    for words, found in (
        (["--help=all"], r"Windows:.*--stride.*Output:.*ModelConfig:.*--hf-overrides"),
        (["--help=listgroup"], r"Windows.*ModelConfig.*CacheConfig"),
        (["--help=CacheConfig"], r"--block-size"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["perplexity", *words])
        assert exit_.value.code == 0
        assert re.search(found, capsys.readouterr().out, re.DOTALL)


def test_completion_knows_our_options_and_vllms() -> None:
    pytest.importorskip("shtab")
    script = completion("bash")
    for word in ("perplexity", "--convention", "--kv-cache-dtype", "--scaler", "--quick"):
        assert word in script
    for words, completed in (
        ("perp", "perplexity"),
        ("sequence --kv-cache-dtype-s", "--kv-cache-dtype-skip-layers"),
        ("eig --lambda-c", "--lambda-cost"),
    ):
        last, before = words.split()[-1], ["vllm-score", *words.split()[:-1]][-1]
        press_tab = (
            f"COMP_WORDS=(vllm-score {words}); COMP_CWORD={len(words.split())}\n"
            f"_shtab_vllm_score vllm-score {last} {before}; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(
            ["bash"], input=f"{script}\n{press_tab}\n", text=True, capture_output=True
        )
        assert done.stdout.split() == [completed], (done.stdout, done.stderr)


# Before any engine starts: what score mode does not serve, and what does not fit.
REFUSED = [
    (["--kv-sharing-fast-prefill"], "kv_sharing_fast_prefill skips"),
    (["--max-model-len", "2"], "--max-model-len is 2|the most that .* takes is 2"),
    (["--max-model-len", "4096"], r"\(4096\) is greater.*shorten the texts or windows"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_engines_that_cannot_score_are_refused(
    model_dir: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pair = ["--context", "The header of", "--target", " a message", "--quiet"]
    with pytest.raises(SystemExit) as exit_:
        main(["sequence", str(model_dir("llama")), *pair, *words])
    assert exit_.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("vllm-score: ") and re.search(message, line)
