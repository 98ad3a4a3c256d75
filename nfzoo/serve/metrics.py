"""Figures of a running server, in the text format of Prometheus."""

from __future__ import annotations


class Metrics:
    """Counts and times of requests and batches, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = own = CollectorRegistry()
        ProcessCollector(registry=own)  # memory, processor time, open files
        kind = ["endpoint"]
        self._requests = Counter("nfzoo_requests", "answers", [*kind, "status"], registry=own)
        self._seconds = Histogram("nfzoo_request_seconds", "time from headers to answer", kind, registry=own)
        self._taken = Gauge("nfzoo_requests_in_progress", "requests that are read, wait or are computed", registry=own)
        sizes = [2.0**i for i in range(9)]
        self._sizes = Histogram("nfzoo_batch_images", "images of a batch", buckets=sizes, registry=own)
        self._compute = Histogram("nfzoo_batch_seconds", "time to compute a batch", registry=own)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def taken(self, requests: int) -> None:
        """Set the number of requests that are being answered."""
        self._taken.set(requests)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch that was computed."""
        self._sizes.observe(images)
        self._compute.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Return all figures, and the content type of their format."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
