"""The docstring corpus: what it holds, and that the split is clean."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.corpus import (
    Corpus,
    Document,
    read_documents,
    split_corpus,
    standard_library_corpus,
    text_bytes,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library_corpus()


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_docstrings_in_the_order_of_the_source_each_once(tmp_path: Path) -> None:
    _write(
        tmp_path / "b.py",
        '"""Module."""\n'
        "class C:\n"
        '    """Class.\n\n      Indented.\n    Not.\n    """\n'
        "    if True:\n"
        '        def method(self):\n            "Method."\n'
        'async def late():\n    """Late."""\n'
        'def twin():\n    """Class.\n\n      Indented.\n    Not.\n    """\n'
        'value = """no docstring"""\n',
    )
    _write(tmp_path / "a.py", 'def first():\n    """Late."""\n')
    _write(tmp_path / "c.py", '"""Late."""\n')
    documents = read_documents(tmp_path)
    assert documents == [
        Document("a", "Late.\n"),
        Document("b", "Module.\n\nClass.\n\n  Indented.\nNot.\n\nMethod.\n"),
    ]


def test_what_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "good.py", '"""Kept."""\n')
    _write(tmp_path / "latin.py", '# -*- coding: latin-1 -*-\n"""Caf\xe9."""\n'.encode("latin-1"))
    _write(tmp_path / "broken.py", '"""Lost."""\ndef (:\n')
    _write(tmp_path / "null.py", b'"""Lost."""\n\0')
    _write(tmp_path / "bytes.py", b'"""Lost \xff."""\n')
    _write(tmp_path / "surrogate.py", '"""Lost \\ud800."""\n')
    _write(tmp_path / "empty.py", '"""   """\n')
    _write(tmp_path / "dangling.py", "x = 1\n")
    for folder in ("test", "package/tests", "site-packages/other", "idlelib", "tkinter"):
        _write(tmp_path / folder / "module.py", f'"""Lost in {folder}."""\n')
    _write(tmp_path / "folder.py" / "inner.py", '"""Inner."""\n')
    found = {document.module: document.text for document in read_documents(tmp_path)}
    assert found == {"good": "Kept.\n", "latin": "Café.\n", "folder.py/inner": "Inner.\n"}


def test_the_standard_library_gives_enough_text(corpus: Corpus) -> None:
    assert text_bytes(corpus.train) > 500_000
    assert text_bytes(corpus.held_out) > 30_000
    everything = "".join(d.text for d in (*corpus.train, *corpus.held_out))
    assert text_bytes(corpus.train + corpus.held_out) == len(everything.encode())


def test_no_docstring_and_no_package_is_on_both_sides(corpus: Corpus) -> None:
    assert not {d.package for d in corpus.train} & {d.package for d in corpus.held_out}
    # Checked on the sources themselves: a held-out docstring is in no training document.
    root = Path(sysconfig.get_path("stdlib"))
    training_text = "\n".join(document.text for document in corpus.train)
    checked = 0
    for document in corpus.held_out:
        tree = ast.parse((root / f"{document.module}.py").read_bytes())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            docstring = ast.get_docstring(function)
            if docstring and len(docstring) > 200 and docstring in document.text:
                assert docstring not in training_text
                checked += 1
    assert checked > 20


def test_reading_twice_gives_the_same() -> None:
    root = Path(sysconfig.get_path("stdlib")) / "asyncio"
    first, second = read_documents(root), read_documents(root)
    assert first == second
    assert len(first) > 10
    assert split_corpus(first).sha256() == split_corpus(second).sha256()


def test_the_side_of_a_package_does_not_depend_on_the_others() -> None:
    documents = [Document(f"package{i}/module", f"text {i}\n") for i in range(400)]
    whole = split_corpus(documents, held_out_fraction=0.25)
    odd = split_corpus(documents[1::2], held_out_fraction=0.25)
    assert set(odd.held_out) == set(whole.held_out) & set(documents[1::2])
    assert 60 <= len(whole.held_out) <= 140  # binomial: 100 expected, standard deviation 8.7
    more = split_corpus(documents, held_out_fraction=0.5)
    assert set(whole.held_out) < set(more.held_out)


def test_the_hash_sees_text_and_split() -> None:
    a, b = Document("a", "x\n"), Document("b", "y\n")
    hashes = {
        Corpus((a,), (b,)).sha256(),
        Corpus((b,), (a,)).sha256(),
        Corpus((a, b), ()).sha256(),
        Corpus((a,), (Document("b", "z\n"),)).sha256(),
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_holds_out_nothing_sensible_is_refused(fraction: float) -> None:
    with pytest.raises(ScoreModeError, match=r"held_out_fraction must be .*above 0 and below 1"):
        split_corpus([], held_out_fraction=fraction)


def test_a_python_without_sources_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "only.py", '"""Little."""\n')
    with pytest.raises(ScoreModeError, match=r"only 8 bytes of docstrings .*use a full Python"):
        standard_library_corpus(root=tmp_path)
