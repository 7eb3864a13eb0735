"""Search pictures by text, by picture or by both: an index on disk with re-ranking, and re-ranking alone."""

from .index import Hit, ImageIndex, IndexStats
from .indexing import Changes
from .ranking import Ranking, SearchModel, TCLCrossEncoder, rank
from .storage import SearchError

__all__ = [
    "Changes",
    "Hit",
    "ImageIndex",
    "IndexStats",
    "Ranking",
    "SearchError",
    "SearchModel",
    "TCLCrossEncoder",
    "rank",
]
