"""The register as Markdown, for SCORE_MODE_IMPLEMENTATION.md."""

from __future__ import annotations

import inspect
import re

from vllm.score.patches import MODULES, REGISTER


def notes() -> dict[str, list[tuple[str, str]]]:
    """(heading, text) of every target, read from the docstrings of the patches' modules."""
    found = {}
    for module in MODULES:
        _, *sections = re.split(r"^(?=vllm\.)", inspect.getdoc(module) or "", flags=re.MULTILINE)
        for section in sections:
            target, _, text = section.partition("\n")
            items = re.findall(r"^    (\S[^:]*): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
            found[target] = [(heading, " ".join(words.split())) for heading, words in items]
    return found


def markdown() -> str:
    """One section per patch: what, where, why, how, risk, pull request, when it is deleted."""
    parts, texts = [], notes()
    for patch in REGISTER:
        names = ", ".join(f"`{name}`" for name in patch.contract)
        lines = [("What", f"{names} ({', '.join(patch.roles)})."), *texts[patch.target]]
        listed = "".join(f"* **{heading}**: {text}\n" for heading, text in lines)
        parts.append(f"### `{patch.target}`\n\n{listed}")
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
