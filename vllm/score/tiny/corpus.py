"""Text found on every machine, the docstrings of Python's standard library, and tokenizers for it.

One document per source file, its docstrings in the order of the source. The text depends on the
Python release (and on what the distribution packages with it), on nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vllm.score.checks import Number, Whole, check
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
MINIMUM_VOCABULARY = 256 + 2  # every byte, BOS and EOS

# Installed packages would make the text depend on the machine; tests hold hardly any prose.
_EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
# Parts that distributions package apart: without them the text is nearly the same everywhere.
_EXCLUDED_PACKAGES = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo"}
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """The docstrings of one source file.

    Attributes:
        module: path of the file under the library's root, with "/" and without ".py".
        text: its docstrings, separated by a blank line; never empty, always valid UTF-8.
    """

    module: str
    text: str

    @property
    def package(self) -> str:
        """The top-level module or package that the file belongs to."""
        return self.module.split("/", 1)[0]


@dataclass(frozen=True)
class Corpus:
    """Documents for training and documents that training never sees."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def sha256(self) -> str:
        """Hash of all the text and of the way it is split."""
        train, held_out = (
            "".join(f"{document.module}\0{document.text}\0" for document in part)
            for part in (self.train, self.held_out)
        )
        return hashlib.sha256(f"{train}\1{held_out}\1".encode()).hexdigest()


def text_bytes(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of their texts."""
    return sum(len(document.text.encode()) for document in documents)


def standard_library_corpus(
    *, held_out_fraction: float = 0.08, root: Path | None = None, minimum_bytes: int = 200_000
) -> Corpus:
    """The docstrings of the standard library, split into training and held-out text.

    Args:
        held_out_fraction: expected share of the top-level packages that is held out, in (0, 1).
        root: folder of the standard library's sources; by default the running Python's.
        minimum_bytes: least amount of text in all.

    Raises:
        ScoreModeError: for a fraction outside (0, 1), or where less text is found than asked for
            (a Python without its sources), or where one side of the split is empty.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    corpus = split_corpus(read_documents(folder), held_out_fraction=held_out_fraction)
    found = text_bytes(corpus.train) + text_bytes(corpus.held_out)
    if found < minimum_bytes or not corpus.train or not corpus.held_out:
        raise ScoreModeError(
            f"only {found:,} bytes of docstrings found under {folder} (at least {minimum_bytes:,} "
            "are needed, for training and for the held-out part): this Python seems to lack the "
            "sources of its standard library; use a full Python, or pass a model of your own"
        )
    return corpus


def read_documents(root: Path) -> list[Document]:
    """The documents of every Python file under `root`, sorted by path.

    A docstring that occurs in several places is kept where it comes first. Files that cannot be
    read or parsed are skipped.
    """
    paths = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.py")}
    seen: set[str] = set()
    documents = []
    for module in sorted(paths):
        parts = module.split("/")
        if parts[0] in _EXCLUDED_PACKAGES or _EXCLUDED_FOLDERS.intersection(parts[:-1]):
            continue
        new = [text for text in dict.fromkeys(_docstrings(paths[module])) if text not in seen]
        seen.update(new)
        if new:
            documents.append(Document(module, "\n\n".join(new) + "\n"))
    return documents


def split_corpus(documents: Iterable[Document], *, held_out_fraction: float = 0.08) -> Corpus:
    """Split by top-level package, so that no held-out file has a sibling in the training text.

    A package is held out when a hash of its name, read as a number in [0, 1), is below
    `held_out_fraction`: the side a package falls on does not depend on the other packages.

    Raises:
        ScoreModeError: for a fraction outside (0, 1).
    """
    check("held_out_fraction", held_out_fraction, Annotated[Number, Field(gt=0, lt=1)])
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.package.encode()).digest()
        below = int.from_bytes(digest[:8], "big") / 2**64 < held_out_fraction
        (held_out if below else train).append(document)
    return Corpus(tuple(train), tuple(held_out))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for text in _walk(tree):
        # Lone surrogates (written as escapes) have no UTF-8 form.
        if text and text.encode(errors="ignore").decode() == text:
            yield text


def _walk(node: ast.AST) -> Iterator[str]:
    """Docstrings ("" for none) of a node and of what it contains, in the order of the source."""
    if isinstance(node, _DOCUMENTED):
        yield (ast.get_docstring(node) or "").strip()
    for child in ast.iter_child_nodes(node):
        # Definitions stand in statements (and their except/case arms), never in expressions.
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _walk(child)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text is encoded without loss.

    The tokenizer adds no BOS by itself, as GPT-2's does: whether a BOS is scored or only given as
    context is then said by the caller, and the tokens of a text are the same everywhere.
    BOS has id 0, EOS id 1. The result is smaller than `vocab_size` where the texts are too short
    for that many merges (none at all leaves the bytes and the two special tokens).

    Args:
        texts: the training text; its order does not matter.
        vocab_size: size of the vocabulary, special tokens included.

    Raises:
        ScoreModeError: for a `vocab_size` that cannot hold the 256 bytes and the special tokens.
    """
    check(
        "vocab_size",
        vocab_size,
        Annotated[Whole, Field(ge=MINIMUM_VOCABULARY)],
        "a byte-level tokenizer has 256 bytes, BOS and EOS",
    )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
