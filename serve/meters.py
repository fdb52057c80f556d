"""Prometheus metrics of an app with several replicas, in one answer.

Each replica keeps its own counts. Whichever replica is asked for /metrics collects the snapshots of all and labels each series
with its replica, so that it does not matter which one a scrape reaches; `sum(rate(...))` gives the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

LATENCIES_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Family(NamedTuple):
    """A metric and its samples (name, labels, value), as plain values that any process can read."""

    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


Snapshot = list[Family]


class Meters:
    """The metrics of one replica. What every app counts is here; an app adds its own to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def snapshot(self) -> Snapshot:
        """What the registry holds now."""
        return [
            Family(
                m.name, m.documentation, m.type, [(s.name, dict(s.labels), s.value) for s in m.samples if kept(s.name)]
            )
            for m in self.registry.collect()
        ]


def kept(sample: str) -> bool:
    """Whether a sample tells anything: when a series began is known from the scrapes."""
    return not sample.endswith("_created")


class FrontMeters(Meters):
    """Metrics of the replica that takes requests."""

    def __init__(self) -> None:
        super().__init__()
        own = self.registry
        self.requests = Counter("raysys_requests", "Requests answered.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "raysys_request_seconds", "Time from the first byte read to the last written.", ["route"],
            buckets=LATENCIES_S, registry=own,
        )  # fmt: skip
        self.waiting = Gauge("raysys_requests_waiting", "Requests that are being worked on or wait.", registry=own)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


class _Merged(Collector):
    def __init__(self, snapshots: Mapping[str, Snapshot]) -> None:
        self.snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, snapshot in sorted(self.snapshots.items()):
            for name, text, kind, samples in snapshot:
                family = families.setdefault(name, Metric(name, text, kind))
                for sample, labels, value in samples:
                    family.add_sample(sample, {**labels, "replica": replica}, value)
        yield from families.values()


def exposition(snapshots: Mapping[str, Snapshot]) -> bytes:
    """The text that Prometheus reads: every replica's series, each with its `replica` label."""
    registry = CollectorRegistry()
    registry.register(_Merged(snapshots))
    return generate_latest(registry)
