"""The numbers that the service counts, for Prometheus."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one service, in a registry of their own.

    Args:
        known_paths: paths that are counted by name; all others are counted as "other", whatever clients invent.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, known_paths: frozenset[str]):
        self.known_paths = known_paths
        own = self.registry = CollectorRegistry()
        self.requests = Counter("tcl_requests", "Requests by path and status.", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "tcl_request_seconds", "Time of a request, from its headers on.", ["path"], buckets=_SECONDS, registry=own
        )
        self.batches = Histogram("tcl_batch_size", "Items of a batch.", ["kind"], buckets=_SIZES, registry=own)
        self.model_seconds = Counter("tcl_model_seconds", "Time in the model.", ["kind"], registry=own)
        self.queue = Gauge("tcl_queue_length", "Texts and pictures that wait for the model.", registry=own)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Read the length of the queue whenever the metrics are read."""
        self.queue.set_function(waiting)

    def request(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count a request; 499 is the status of one whose client has left."""
        path = scope["path"] if scope["path"] in self.known_paths else "other"
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def batch(self, kind: Hashable, size: int, seconds: float) -> None:
        """Count a batch, by the first part of its kind."""
        name = str(kind[0]) if isinstance(kind, tuple) else str(kind)
        self.batches.labels(name).observe(size)
        self.model_seconds.labels(name).inc(seconds)

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)
