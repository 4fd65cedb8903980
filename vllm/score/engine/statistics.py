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

Where the target's logit is summed in another order than the row's (several kernels do so), ``rank``
counts tokens nearer to the target than float32 rounding either way.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.score.checks import check_name
from vllm.score.errors import ScoreModeError

STATISTICS: tuple[str, ...] = (
    "entropy",
    "varentropy",
    "rank",
    "argmax",
    "argmax_logprob",
    "margin",
    "collision_probability",
    "logsumexp",
    "head_mass",
    "model_logprob",
    "logit_mean",
    "logit_variance",
)

INTEGER_STATISTICS = frozenset({"rank", "argmax"})


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
