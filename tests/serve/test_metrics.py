"""Figures in Prometheus's format."""

from __future__ import annotations

import re

import pytest

from nfzoo.serve.metrics import Metrics


def values(text: bytes) -> dict[str, float]:
    """Sample -> value, by a reader of our own."""
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"\\]*",?)*\})? \S+', line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_requests_and_batches_are_counted() -> None:
    metrics, others = Metrics(), Metrics()
    for seconds in (0.002, 0.7):
        metrics.request("/predict", 200, seconds)
    metrics.request("other", 404, 0.001)
    metrics.taken(5)
    metrics.batch(3, 0.2)
    text, kind = metrics.text()
    assert kind.startswith("text/plain")
    found = values(text)
    assert found['nfzoo_requests_total{endpoint="/predict",status="200"}'] == 2
    assert found['nfzoo_requests_total{endpoint="other",status="404"}'] == 1
    assert found['nfzoo_request_seconds_bucket{endpoint="/predict",le="0.5"}'] == 1
    assert found['nfzoo_request_seconds_sum{endpoint="/predict"}'] == pytest.approx(0.702)
    assert found["nfzoo_requests_in_progress"] == 5
    assert found['nfzoo_batch_images_bucket{le="2.0"}'] == 0
    assert found['nfzoo_batch_images_bucket{le="4.0"}'] == 1
    assert found["nfzoo_batch_seconds_sum"] == pytest.approx(0.2)
    assert "nfzoo_requests_total{" not in others.text()[0].decode()
