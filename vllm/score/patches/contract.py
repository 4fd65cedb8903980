"""What a patch relies on in vLLM: the forms of functions and fields, found and recorded.

`upstream.json` holds them for every release that score mode was tested with, as
`vllm.score.patches.drift` read them in its source. A form is the text between the parentheses of a
signature, without annotations and with `=` for any default: `self, request, *, limit=`. That of a
field is its annotation.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from functools import cache
from importlib.resources import files
from types import CodeType
from typing import Any

RECORD = "upstream.json"


@cache
def record() -> dict[str, dict[str, list[str]]]:
    """Release to `module:dotted` to [form, hash of the body]; the hash is empty for fields."""
    text = files("vllm.score.patches").joinpath(RECORD).read_text(encoding="utf-8")
    found: dict[str, dict[str, list[str]]] = json.loads(text)
    return found


def recorded_forms(name: str) -> tuple[str, ...]:
    """The forms that `module:dotted` has in the releases on record, each once."""
    return tuple(dict.fromkeys(r[name][0] for r in record().values() if name in r))


def form_of(function: Any) -> str:
    """The form of a function, also of a static, class or wrapped one."""
    function = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
    return form(inspect.signature(function))


def form(signature: inspect.Signature) -> str:
    """The form of a signature."""
    plain = [
        parameter.replace(annotation=parameter.empty, default=parameter.empty)
        if parameter.default is parameter.empty
        else parameter.replace(annotation=parameter.empty, default=_ANY)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(plain))[1:-1]


class _Any:
    def __repr__(self) -> str:
        return ""


_ANY = _Any()


def annotation_of(cls: type, name: str) -> str | None:
    """The annotation of a field in the source of its class; None where it has no such field."""
    found = (field_in(_tree(base), name) for base in cls.__mro__ if _has_source(base))
    return next((annotation for annotation in found if annotation is not None), None)


def _has_source(cls: type) -> bool:
    return hasattr(sys.modules.get(cls.__module__), "__file__")


@cache
def _tree(cls: type) -> ast.ClassDef:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return tree


def field_in(tree: ast.ClassDef, name: str) -> str | None:
    """The annotation of a field in the syntax tree of its class, or None."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return ast.unparse(node.annotation)
    return None


def names_in(function: Any) -> set[str]:
    """Every attribute and global that a function reads, its inner functions included."""
    pending, found = [inspect.unwrap(function).__code__], set()
    while pending:
        code = pending.pop()
        found |= set(code.co_names)
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found
