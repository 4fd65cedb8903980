"""Where the text comes from: strings, token ids, local files, standard input, `datasets`.

`as_source` takes what a caller has in hand; `file_source`, `hub_source` and `stdin_source` take
names. All give a `Source`: documents in pieces, which need not fit in memory.
"""

from vllm.score.data.sources import (
    DatasetSource,
    DocumentsSource,
    Source,
    SpooledSource,
    TextSource,
    TokenIdsSource,
    as_source,
    file_source,
    stdin_source,
)
from vllm.score.data.tables import hub_source

__all__ = [
    "DatasetSource",
    "DocumentsSource",
    "Source",
    "SpooledSource",
    "TextSource",
    "TokenIdsSource",
    "as_source",
    "file_source",
    "hub_source",
    "stdin_source",
]
