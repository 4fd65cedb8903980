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
    from vllm.score.cli.model import parse

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


def refused(capsys: pytest.CaptureFixture[str], name: str, value: str) -> str:
    """What is said of a value: one line, which ends the program."""
    with pytest.raises(SystemExit) as exit_:
        parse("M", name, value)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {name}" in line and f"{value!r} is not the JSON object that it takes" in line
    assert f"""give one, e.g. {name} '{{"key": 1}}', or its keys, e.g. {name}.key 1""" in line
    return line


def test_every_option_in_json_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm.score.cli.model import make_parser

    actions = make_parser(options.sequence, "vllm-score sequence")._actions
    documented = [a.option_strings[0] for a in actions if "valid JSON string" in (a.help or "")]
    assert len(documented) > 15
    for name in (*documented, "--hf-overrides", "--additional-config", "--pt-load-map-location"):
        refused(capsys, name, "{bad")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("--hf-overrides", "bad", "Expecting value"),
        ("--hf-overrides", "[1]", "another kind"),
        ("--hf-overrides", "{'max_position_embeddings': 512}", "double quotes"),
        ("--speculative-config", "3", "another kind"),
        ("--speculative-config", "{bad}", "double quotes"),
        ("--compilation-config", '{"modee": 1}', "modee is 1"),
    ],
)
def test_json_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], name: str, value: str, reason: str
) -> None:
    assert reason in refused(capsys, name, value)


def test_json_is_as_vllm_takes_it() -> None:
    words = ("--hf-overrides", '{"a": {"b": 1}}', "--pt-load-map-location", "cuda")
    found = parse("M", *words, "--speculative-config", "None").engine
    assert found == {
        "hf_overrides": {"a": {"b": 1}},
        "pt_load_map_location": "cuda",
        "speculative_config": None,
    }


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
