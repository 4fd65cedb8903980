"""An order in which requests that begin alike follow each other.

The engine computes a prefix once while its blocks stay in the cache, from the step on in which they
are first computed. Neighbours find them there however small the cache is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Shorter prefixes are not worth another order: they fill no block of the cache.
SHARED_TOKENS = 16


def shared_prefix_order(prompts: Sequence[np.ndarray]) -> list[int]:
    """Indices of `prompts`, those that share a prefix next to each other.

    Groups that share at least `SHARED_TOKENS` tokens stay in the order of their first members. In
    a group the order is that of the token ids, so that longer shared prefixes are adjacent too.
    The order is unchanged where nothing is shared.

    Args:
        prompts: arrays of token ids, [n] each, of one dtype.
    """
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        # Prompts too short to share so much are groups of their own.
        long_enough = len(prompt) >= SHARED_TOKENS
        prefix = prompt[:SHARED_TOKENS].tobytes() if long_enough else b"%d" % i
        groups.setdefault(prefix, []).append(i)

    # Bytes compare fast; big-endian ones compare like the numbers.
    def key(i: int) -> bytes:
        return prompts[i].astype(">i4").tobytes()

    return [
        i
        for group in groups.values()
        for i in (group if len(group) == 1 else sorted(group, key=key))
    ]
