"""Metrics of the server for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ServerMetrics:
    """The metrics that GET /metrics returns."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.request_seconds = Histogram(
            "freshrec_request_seconds",
            "Time to answer a request, in seconds.",
            ("route", "status"),
            buckets=LATENCY_BUCKETS,
            registry=r,
        )
        self.version = Gauge("freshrec_version", "Number of the live version.", registry=r)
        self.newest_event_age = Gauge(
            "freshrec_newest_event_age_seconds", "Age of the newest event that lists use, in seconds.", registry=r
        )
        self.fallbacks = Counter(
            "freshrec_fallbacks",
            "Number of lists that were filled with popular items, by reason.",
            ("reason",),
            registry=r,
        )
        self.index_recall = Gauge(
            "freshrec_index_recall", "Recall@20 of the search index, a fraction; 1 = exact lists.", registry=r
        )
        self.events = Counter(
            "freshrec_events", "Number of clicks received, by whether they were known already.", ("known",), registry=r
        )
        self.swaps = Gauge("freshrec_swaps", "Number of times that a version went into service.", registry=r)
        self.version_refused = Gauge(
            "freshrec_version_refused", "1 if the live version of the store cannot be served, else 0.", registry=r
        )
        self.connections = Gauge("freshrec_connections", "Number of open connections.", registry=r)
        self.closed_connections = Counter(
            "freshrec_closed_connections",
            "Number of connections that the server refused or closed, by reason.",
            ("reason",),
            registry=r,
        )
