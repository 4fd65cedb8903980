"""What a score request may ask for of a row of logits: statistics by name, and their columns.

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
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm.score.checks import check_name
from vllm.score.errors import ScoreModeError
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction, log_sum_exp

FULL_VOCABULARY = -1
MAX_EXACT_ID = 2**24


@dataclass(frozen=True)
class RowLayout:
    """What is computed for every scored row of one request, and in which columns it travels.

    One float32 row per scored position: ``[targets | statistics | top ids | top logprobs]`` or
    ``[targets | statistics | whole vocabulary]``. Token ids and ranks travel as float32, which is
    exact below 2**24; admission refuses larger vocabularies.

    Attributes:
        num_targets: candidates per position, k.
        statistics: names, in column order.
        top: number of most likely tokens (0: none, -1: the whole vocabulary).
        temperature: the logits are divided by it first.
        top_p: then only the most likely tokens are kept whose probabilities first add up to it.
    """

    num_targets: int
    statistics: tuple[str, ...] = ()
    top: int = 0
    temperature: float = 1.0
    top_p: float = 1.0

    def width(self, vocab_size: int) -> int:
        """Number of columns."""
        return self.top_start + (vocab_size if self.top == FULL_VOCABULARY else 2 * self.top)

    @property
    def needs_logits(self) -> bool:
        """Whether whole rows of logits have to be held at once."""
        return self.top != 0 or self.top_p < 1

    @property
    def top_start(self) -> int:
        """Number of columns before those of the most likely tokens."""
        return self.num_targets + len(self.statistics)


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
        rs.ENTROPY_BIT, lambda s: s[:, rs.SUM_EXP].log() - s[:, rs.SUM_EXP_X] / s[:, rs.SUM_EXP]
    ),
    "varentropy": Statistic(
        rs.ENTROPY_BIT | rs.VARENTROPY_BIT, lambda s: s[:, rs.SUM_EXP_DEV2] / s[:, rs.SUM_EXP]
    ),
    "rank": Statistic(rs.RANK_BIT, lambda s: s[:, rs.RANK] + 1, "int64"),
    "argmax": Statistic(rs.TOP_BIT, lambda s: s[:, rs.ARGMAX], "int64"),
    "argmax_logprob": Statistic(0, lambda s: -torch.log(s[:, rs.SUM_EXP])),
    "margin": Statistic(rs.TOP_BIT, lambda s: s[:, rs.MAX] - s[:, rs.SECOND]),
    "collision_probability": Statistic(
        rs.COLLISION_BIT, lambda s: s[:, rs.SUM_EXP2] / s[:, rs.SUM_EXP].square()
    ),
    "logsumexp": Statistic(0, log_sum_exp),
    "head_mass": Statistic(0, None),
    "model_logprob": Statistic(0, None),
    "logit_mean": Statistic(rs.MOMENTS_BIT, lambda s: s[:, rs.MEAN]),
    "logit_variance": Statistic(rs.MOMENTS_BIT, lambda s: s[:, rs.M2] / s[:, rs.COUNT]),
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
    done: Reduction, layout: RowLayout, out: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> None:
    """Write the targets' log-probabilities and the statistics, in nats.

    Args:
        done: the sums over the whole vocabulary.
        layout: names the columns.
        out: float32 [R, at least k + number of statistics]; its first columns are written.
        given: the statistics that the state does not hold, by name, float32 [R].
    """
    k = layout.num_targets
    torch.sub(done.target_logits[:, :k], log_sum_exp(done.state)[:, None], out=out[:, :k])
    # Targets may be summed in another order than the row, and come out above it by a rounding.
    out[:, :k].clamp_max_(0.0)
    for column, name in enumerate(layout.statistics, start=k):
        formula = STATISTICS[name].formula
        out[:, column] = given[name] if formula is None else formula(done.state)
