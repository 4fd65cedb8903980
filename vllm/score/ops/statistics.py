"""The statistics of a row of logits that a score request may ask for by name.

With ``z`` the model's logits of a row (vocabulary padding left out), ``x = z / score_temperature``,
``p = softmax(x)``, and ``q`` equal to ``p`` restricted to its nucleus of mass ``score_top_p`` and
renormalised (``q = p`` at top-p 1), in nats:

========================  ==================================================================
``entropy``               ``-sum q log q``
``varentropy``            variance of ``log q`` (and of ``x``) under ``q``
``rank``                  1 + number of tokens with a larger logit than the (first) target
``argmax``                id of the most likely token (the lowest id among equals)
``argmax_logprob``        its log-probability under ``q``
``margin``                ``x`` of the first less that of the second most likely token
``collision_probability`` ``sum q**2``
``logsumexp``             ``log sum exp x`` over the nucleus; less the entropy it is ``E_q[x]``
``head_mass``             ``p`` of the nucleus; 1 at top-p 1
``model_logprob``         log-probability of the first target under ``softmax(z)``
``logit_mean``            mean of ``x`` over the vocabulary
``logit_variance``        population variance of ``x`` over the vocabulary
========================  ==================================================================

A statistic is one entry of `STATISTICS`: the columns of the row's state that it reads, and its
formula from them.

Where the target's logit is summed in another order than the row's (several kernels do so), ``rank``
counts tokens nearer to the target than float32 rounding either way.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from vllm.score.checks import check_name
from vllm.score.errors import ScoreModeError
from vllm.score.ops.row_layout import RowLayout
from vllm.score.ops.row_state import (
    ARGMAX,
    COLLISION_BIT,
    COUNT,
    ENTROPY_BIT,
    M2,
    MAX,
    MEAN,
    MOMENTS_BIT,
    RANK,
    RANK_BIT,
    SECOND,
    SUM_EXP,
    SUM_EXP2,
    SUM_EXP_DEV2,
    SUM_EXP_X,
    TOP_BIT,
    VARENTROPY_BIT,
    log_sum_exp,
)


class Statistic(NamedTuple):
    """How a statistic is read off the state of a row.

    Attributes:
        bits: of the columns that the operators have to compute.
        formula: from states float32 [R, 11] to float32 [R]; None where the state does not hold it.
        dtype: of its values in the results.
    """

    bits: int
    formula: Callable[[torch.Tensor], torch.Tensor] | None
    dtype: str = "float32"


STATISTICS: dict[str, Statistic] = {
    "entropy": Statistic(
        ENTROPY_BIT, lambda s: torch.log(s[:, SUM_EXP]) - s[:, SUM_EXP_X] / s[:, SUM_EXP]
    ),
    "varentropy": Statistic(
        ENTROPY_BIT | VARENTROPY_BIT, lambda s: s[:, SUM_EXP_DEV2] / s[:, SUM_EXP]
    ),
    "rank": Statistic(RANK_BIT, lambda s: s[:, RANK] + 1, "int64"),
    "argmax": Statistic(TOP_BIT, lambda s: s[:, ARGMAX], "int64"),
    "argmax_logprob": Statistic(0, lambda s: -torch.log(s[:, SUM_EXP])),
    "margin": Statistic(TOP_BIT, lambda s: s[:, MAX] - s[:, SECOND]),
    "collision_probability": Statistic(
        COLLISION_BIT, lambda s: s[:, SUM_EXP2] / s[:, SUM_EXP].square()
    ),
    "logsumexp": Statistic(0, log_sum_exp),
    "head_mass": Statistic(0, None),
    "model_logprob": Statistic(0, None),
    "logit_mean": Statistic(MOMENTS_BIT, lambda s: s[:, MEAN]),
    "logit_variance": Statistic(MOMENTS_BIT, lambda s: s[:, M2] / s[:, COUNT]),
}


def check_statistics(names: Iterable[str]) -> tuple[str, ...]:
    """Return `names` as a tuple.

    Raises:
        ScoreModeError: a name is unknown or given twice.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        remedy = f"; write [{names!r}]" if isinstance(names, str) else ""
        raise ScoreModeError(f"score_statistics must be a list of names, got {names!r}{remedy}.")
    checked = tuple(names)
    for name in checked:
        check_name("score_statistics: the statistic", name, STATISTICS)
    if len(set(checked)) != len(checked):
        raise ScoreModeError(f"score_statistics names a statistic twice: {list(checked)}.")
    return checked


def statistics_mask(names: tuple[str, ...]) -> int:
    """The bits that the named statistics need."""
    return functools.reduce(operator.or_, (STATISTICS[name].bits for name in names), 0)


def score_columns(
    state: torch.Tensor,
    target_logits: torch.Tensor,
    layout: RowLayout,
    out: torch.Tensor,
    given: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Write the targets' log-probabilities and the statistics, in nats.

    Args:
        state: float32 [R, 11], of the whole vocabulary.
        target_logits: float32 [R, k].
        layout: names the columns.
        out: float32 [R, at least k + number of statistics]; its first columns are written.
        given: the statistics that the state does not hold, by name, float32 [R].
    """
    k = layout.num_targets
    if k:
        torch.sub(target_logits[:, :k], log_sum_exp(state)[:, None], out=out[:, :k])
        # Targets may be summed in another order than the row, and come out above it by a rounding.
        out[:, :k].clamp_max_(0.0)
    for column, name in enumerate(layout.statistics, start=k):
        formula = STATISTICS[name].formula
        out[:, column] = given[name] if formula is None else formula(state)
