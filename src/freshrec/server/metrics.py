"""Metrics of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ServerMetrics:
    """The metrics of GET /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.request_seconds = Histogram(
            "freshrec_request_seconds",
            "How long answers took.",
            ("route", "status"),
            buckets=LATENCY_BUCKETS,
            registry=r,
        )
        self.version = Gauge("freshrec_version", "The version that is served.", registry=r)
        self.newest_event_age = Gauge(
            "freshrec_newest_event_age_seconds", "Since the newest event that is answered from.", registry=r
        )
        self.fallbacks = Counter("freshrec_fallbacks", "Lists that popular items complete.", ("reason",), registry=r)
        self.index_recall = Gauge(
            "freshrec_index_recall", "Of the best items the index finds; 1: all are scored.", registry=r
        )
        self.events = Counter("freshrec_events", "Clicks taken.", ("known",), registry=r)
        self.swaps = Gauge("freshrec_swaps", "How often a version was taken into service.", registry=r)
        self.version_refused = Gauge(
            "freshrec_version_refused", "1: the store points to a version that cannot be served.", registry=r
        )
