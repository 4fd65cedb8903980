"""`RequestOutput.scores`: None unless the request asked for scores."""

from __future__ import annotations

from types import ModuleType

from vllm.score.patches.patch import Patch


def apply(module: ModuleType) -> None:
    """Give the class the default."""
    module.RequestOutput.scores = None


PATCH = Patch(
    target="vllm.outputs",
    contract={"RequestOutput.__init__": ("self", "request_id", "prompt", "prompt_token_ids")},
    apply=apply,
    holds=lambda module: module.RequestOutput.scores is None,
    roles=("front end",),
    why="The scores as arrays, beside the stock-looking prompt_logprobs.",
    how="A class attribute; finished score requests set it on the instance.",
    risk="None known.",
    upstream="Pull request: a field of RequestOutput.",
    remove_when="RequestOutput has the field.",
)
