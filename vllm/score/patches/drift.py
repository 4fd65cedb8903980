"""What another vLLM release changes in the functions and fields that score mode relies on.

    python -m vllm.score.patches.drift 0.34.0           # fetches that release's wheel
    python -m vllm.score.patches.drift vllm-0.34.0.whl  # or a wheel, or a folder that holds vllm/
    python -m vllm.score.patches.drift 0.34.0 --record  # its forms become part of the contracts

Only the source is read; nothing of the release is imported or installed. Exit code 0: everything is
as in a release on record, 1: something is new and to be read, 2: the release cannot be read.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.score.patches import REGISTER
from vllm.score.patches.contract import RECORD, field_in, form, record, recorded_forms


class Unreadable(Exception):
    """A release that cannot be read, in words."""


def names() -> list[str]:
    """`module:dotted` of everything that the register relies on, in its order."""
    found = []
    for patch in REGISTER:
        callers = (name for names in patch.calls.values() for name in names)
        own = (*patch.contract, *patch.fields, *callers, *patch.relies_on)
        found += [name if ":" in name else f"{patch.target}:{name}" for name in own]
    return list(dict.fromkeys(found))


class Release:
    """The source of a release: a folder or a wheel that holds `vllm/`."""

    def __init__(self, root: Path | zipfile.Path, version: str) -> None:
        self.root, self.version = root, version
        self._trees: dict[str, ast.Module] = {}

    def find(self, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | str | None:
        """The syntax tree of a function, the annotation of a field, or None."""
        module, dotted = name.split(":")
        node: ast.AST = self._tree(module)
        *owners, last = dotted.split(".")
        for owner in owners:
            classes = (n for n in _children(node) if isinstance(n, ast.ClassDef))
            found = [cls for cls in classes if cls.name == owner]
            if not found:
                return None
            node = found[-1]
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        functions = [n for n in _children(node) if isinstance(n, kinds) and n.name == last]
        if functions:
            return functions[-1]
        return field_in(node, last) if isinstance(node, ast.ClassDef) else None

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            path = module.replace(".", "/")
            for candidate in (f"{path}.py", f"{path}/__init__.py"):
                file = self.root.joinpath(candidate)
                if file.is_file():
                    self._trees[module] = ast.parse(file.read_text(encoding="utf-8"))
                    break
            else:
                self._trees[module] = ast.Module([], [])
        return self._trees[module]

    def entry(self, name: str) -> list[str] | None:
        """[form, hash of the body], as on record; None where there is no such thing."""
        found = self.find(name)
        if found is None or isinstance(found, str):
            return None if found is None else [found, ""]
        digest = hashlib.sha256("\n".join(body(found)).encode()).hexdigest()
        return [_form(found), digest[:16]]


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What a module or a class defines, under conditions, too."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _children(child)


def _form(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    given = function.args
    kinds = inspect.Parameter
    plain = [*given.posonlyargs, *given.args]
    with_default = len(plain) - len(given.defaults)
    parameters = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_ONLY if i < len(given.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if i < with_default else None,
        )
        for i, argument in enumerate(plain)
    ]
    if given.vararg:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        value = kinds.empty if default is None else None
        parameters.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=value))
    if given.kwarg:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return form(inspect.Signature(parameters))


def body(found: ast.FunctionDef | ast.AsyncFunctionDef | str | None) -> list[str]:
    """The lines of a function, without its docstring, comments and annotations; or of a field."""
    if found is None or isinstance(found, str):
        return [found] if found else []
    tree = ast.parse(ast.unparse(found)).body[0]
    assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    tree.returns = None
    return ast.unparse(tree).splitlines()


@contextmanager
def opened(release: str) -> Iterator[Release]:
    """A release by its number, its wheel or a folder that holds `vllm/`.

    Raises:
        Unreadable: there is no such release, or it holds no vLLM.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(release)
        if re.fullmatch(r"\d+\.\d+[\w.+]*", release) and not path.exists():
            path = _download(release, Path(scratch))
        if path.is_dir():
            yield _release(path, release)
        else:
            try:
                archive = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise Unreadable(f"{release} cannot be read: {error}") from None
            with archive:
                yield _release(zipfile.Path(archive), release)


def _release(root: Path | zipfile.Path, given: str) -> Release:
    if not root.joinpath("vllm", "__init__.py").is_file():
        raise Unreadable(f"{given} holds no vllm/__init__.py: give a release, a wheel or a folder")
    packages = (entry.name for entry in root.iterdir())
    versions = (re.fullmatch(r"vllm(?:_cpu)?-(\d[^+]*)(?:\+.*)?\.dist-info", n) for n in packages)
    return Release(root, next((m[1] for m in versions if m), given))


def _download(release: str, folder: Path) -> Path:
    command = ["pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    platforms = [a for n in (28, 31, 34, 35) for a in ("--platform", f"manylinux_2_{n}_x86_64")]
    done = subprocess.run(
        [sys.executable, "-m", *command, *platforms, f"vllm=={release}"],
        capture_output=True,
        text=True,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        cause = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise Unreadable(f"vllm {release} cannot be fetched: {cause}")
    return wheels[0]


def installed() -> Release:
    """The vLLM beside us."""
    from vllm import __file__ as package
    from vllm.score.armed import upstream_version

    return Release(Path(str(package)).parents[1], upstream_version().partition("+")[0])


def report(found: Release, base: Release) -> tuple[list[str], int]:
    """The lines of the report, and how many entries are on record for no release."""
    lines: list[str] = []
    unknown = 0
    for name in names():
        new, old = found.entry(name), base.entry(name)
        if new is None and old is None:
            continue  # of another release of the range
        known = [version for version, entries in record().items() if entries.get(name) == new]
        unknown += not known
        if new == old:
            lines.append(f"same     {name}")
            continue
        status = "gone" if new is None else "new" if old is None else "changed"
        lines.append(f"{status:<8} {name}" + (f" (as in {', '.join(known)})" if known else ""))
        if new is not None and new[0] not in recorded_forms(name):
            lines.append(f"    breaks the contract: {new[0]}")
        before, after = body(base.find(name)), body(found.find(name))
        changed = difflib.unified_diff(before, after, lineterm="", n=0)
        if new is not None and old is not None:
            lines += [
                f"    {line}" for line in changed if not line.startswith(("---", "+++", "@@"))
            ]
    return lines, unknown


def save(found: Release, file: Path) -> None:
    """Add a release to the record, or replace it there."""
    entries = {name: entry for name in names() if (entry := found.entry(name)) is not None}
    releases = dict(record(), **{found.version: entries})
    ordered = dict(sorted(releases.items(), key=lambda item: _numbers(item[0])))
    # A line an entry: what a release changed is read from the difference.
    blocks = [
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in of.items())
        + "\n}"
        for version, of in ordered.items()
    ]
    file.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm.score.patches.drift",
        description="What a vLLM release changes in what score mode relies on.",
    )
    parser.add_argument("release", help="a release's number, a wheel, or a folder with vllm/ in it")
    parser.add_argument("--base", help="what it is compared with; default: the vLLM installed here")
    parser.add_argument(
        "--record", action="store_true", help="add the release to the record of tested ones"
    )
    given = parser.parse_args(arguments)
    try:
        with opened(given.release) as found:
            if given.record:
                save(found, Path(__file__).with_name(RECORD))
                print(f"{found.version} is on record.")
                return 0
            if given.base is None:
                return _compare(found, installed())
            with opened(given.base) as base:
                return _compare(found, base)
    except Unreadable as error:
        print(f"drift: {error}", file=sys.stderr)
        return 2


def _compare(found: Release, base: Release) -> int:
    lines, unknown = report(found, base)
    print(f"vLLM {found.version} against {base.version}:", *lines, sep="\n")
    entries = [line for line in lines if line[0] != " "]
    changed = sum(not line.startswith("same") for line in entries)
    print(f"{changed} of {len(entries)} differ, {unknown} of them from every release on record.")
    return int(unknown > 0)


if __name__ == "__main__":
    sys.exit(main())
