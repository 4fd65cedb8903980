"""Prefixes that a KV connector brings: they end before the first scored row, as cached ones do.

A connector says how many tokens behind the local hit it can load, and is told the number again once
their blocks are allocated. Many of them check that it is theirs (LMCache, Mooncake's store, 3FS) or
load what they found whatever the number; but 0, "load nothing", is in the contract, and what vLLM
itself gives them for `skip_reading_prefix_cache`. So a hit is taken as a whole or not at all. What
requests share ends where their continuations begin to differ, so little is lost.
"""

from __future__ import annotations

from typing import Any


def limit_external_hits(connector: Any, reads_prefixes: bool) -> None:
    """Have a connector's hits for score requests end at or before the first scored row.

    Args:
        connector: of the scheduler. A `MultiConnector` hands the number to the one that it chose.
        reads_prefixes: False: score requests take no hit at all.
    """
    look_up = connector.get_num_new_matched_tokens

    def limited(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found, later = look_up(request, num_computed_tokens)
        params = request.sampling_params
        if params is None or not params.score_mode or found is None:
            return found, later
        room = params._score.start - num_computed_tokens if reads_prefixes else 0
        return (found, later) if 0 < found <= room else (0, False)

    connector.get_num_new_matched_tokens = limited
