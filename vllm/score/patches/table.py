"""The register as Markdown, for SCORE_MODE_IMPLEMENTATION.md."""

from __future__ import annotations

from vllm.score.patches.register import REGISTER


def markdown() -> str:
    """One section a patch: what, where, why, how, risk, pull request, when it is deleted."""
    parts = []
    for patch in REGISTER:
        names = ", ".join(f"`{name}`" for name in patch.contract)
        parts.append(
            f"### `{patch.target}`\n\n"
            f"* **What**: {names} ({', '.join(patch.roles)}).\n"
            f"* **Why**: {patch.why}\n"
            f"* **How**: {patch.how}\n"
            f"* **Risk**: {patch.risk}\n"
            f"* **Upstream**: {patch.upstream}\n"
            f"* **Deleted when**: {patch.remove_when}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
