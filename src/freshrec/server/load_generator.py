"""Open-loop load on a server: requests are sent at random times, whether or not earlier ones were answered."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from urllib.parse import quote, urlsplit

import numpy as np

from freshrec.random_streams import numpy_stream

N_CONNECTIONS = 32  # most requests at the same time


@dataclass(frozen=True)
class LoadReport:
    """Latencies and errors. A latency is in ms, from the time a request was due to the end of its answer."""

    asked: int  # requests sent
    answered: int  # answers with status 200
    wrong: dict[str, int]  # number of answers by other statuses, and of failed connections by error
    rate: float  # answers per second
    p50: float  # percentiles of the latency, in ms
    p95: float
    p99: float
    most: float  # largest latency, in ms
    late: float  # 99th percentile of the delay of the load generator itself, in ms
    versions: tuple[int, ...]  # versions that answered


def generate_load(url: str, users: Sequence[str], rate: float, seconds: float, k: int, token: str = "") -> LoadReport:
    """Request lists of random users at random times, `rate` per second on average."""
    rng, requests = numpy_stream(0, "load"), queue.Queue[tuple[float, str] | None]()
    found: list[tuple[float, float, str, int]] = []
    workers = [
        threading.Thread(target=_run_client, args=(url, requests, found, k, token)) for _ in range(N_CONNECTIONS)
    ]
    for worker in workers:
        worker.start()
    started_s = time.perf_counter() + 0.2
    due_s, end_s = started_s, started_s + seconds
    n_requests = 0
    while (due_s := due_s + rng.exponential(1 / rate)) < end_s:
        time.sleep(max(0.0, due_s - time.perf_counter()))
        requests.put((due_s, users[int(rng.integers(len(users)))]))
        n_requests += 1
    for _ in workers:
        requests.put(None)
    for worker in workers:
        worker.join()
    latencies_ms = np.array([latency_ms for latency_ms, _, status, _ in found if status == "200"] or [np.nan])
    late = np.array([late for _, late, _, _ in found] or [np.nan])
    p50, p95, p99 = (float(np.percentile(latencies_ms, q)) for q in (50, 95, 99))
    return LoadReport(
        asked=n_requests,
        answered=sum(status == "200" for _, _, status, _ in found),
        wrong=dict(Counter(status for _, _, status, _ in found if status != "200")),
        rate=len(found) / max(1e-9, time.perf_counter() - started_s),
        p50=p50,
        p95=p95,
        p99=p99,
        most=float(latencies_ms.max()),
        late=float(np.percentile(late, 99)),
        versions=tuple(sorted({version for _, _, _, version in found if version})),
    )


def _run_client(
    url: str,
    requests: queue.Queue[tuple[float, str] | None],
    found: list[tuple[float, float, str, int]],
    k: int,
    token: str,
) -> None:
    """Send due requests one after the other over one connection."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=30)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    while (request := requests.get()) is not None:
        due_s, user = request
        late, version = (time.perf_counter() - due_s) * 1e3, 0
        try:
            connection.request("GET", f"/recommend/{quote(user, safe='')}?k={k}", headers=headers)
            answer = connection.getresponse()
            body, status = answer.read(), str(answer.status)
            if status == "200":
                version = json.loads(body)["version"]
        except (OSError, HTTPException) as problem:
            status = type(problem).__name__
            connection.close()
        found.append(((time.perf_counter() - due_s) * 1e3, late, status, version))
    connection.close()
