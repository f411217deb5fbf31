"""Load on a server, and how it bears it: requests come when they come, whether or not earlier ones were answered."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from urllib.parse import quote, urlsplit

import numpy as np

CLIENTS = 32  # connections, at most so many requests at a time


@dataclass(frozen=True)
class Borne:
    """How a server bore a load; times in milliseconds, from when a request was due to when its answer was whole."""

    asked: int
    answered: int  # with status 200
    wrong: dict[str, int]  # other statuses, and connections that failed
    rate: float  # answers a second
    p50: float
    p95: float
    p99: float
    most: float
    late: float  # 99 in 100 requests were sent this long after they were due, or sooner: else the load itself is slow
    versions: tuple[int, ...]


def bear(url: str, users: Sequence[str], rate: float, seconds: float, k: int, token: str = "") -> Borne:
    """Ask for lists of random users, at random moments, `rate` a second."""
    source, due = random.Random(0), queue.Queue[tuple[float, str] | None]()
    found: list[tuple[float, float, str, int]] = []
    workers = [threading.Thread(target=_client, args=(url, due, found, k, token)) for _ in range(CLIENTS)]
    for worker in workers:
        worker.start()
    begin = time.perf_counter() + 0.2
    moment, end = begin, begin + seconds
    n_asked = 0
    while (moment := moment + source.expovariate(rate)) < end:
        time.sleep(max(0.0, moment - time.perf_counter()))
        due.put((moment, source.choice(users)))
        n_asked += 1
    for _ in workers:
        due.put(None)
    for worker in workers:
        worker.join()
    good = np.array([took for took, _, status, _ in found if status == "200"] or [np.nan])
    late = np.array([late for _, late, _, _ in found] or [np.nan])
    p50, p95, p99 = (float(np.percentile(good, q)) for q in (50, 95, 99))
    return Borne(
        asked=n_asked,
        answered=sum(status == "200" for _, _, status, _ in found),
        wrong=dict(Counter(status for _, _, status, _ in found if status != "200")),
        rate=len(found) / max(1e-9, time.perf_counter() - begin),
        p50=p50,
        p95=p95,
        p99=p99,
        most=float(good.max()),
        late=float(np.percentile(late, 99)),
        versions=tuple(sorted({version for _, _, _, version in found if version})),
    )


def _client(
    url: str,
    due: queue.Queue[tuple[float, str] | None],
    found: list[tuple[float, float, str, int]],
    k: int,
    token: str,
) -> None:
    """Ask for what is due, one request after the other, through one connection."""
    place = urlsplit(url)
    assert place.hostname is not None
    connection = HTTPConnection(place.hostname, place.port, timeout=30)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    while (asked := due.get()) is not None:
        moment, user = asked
        late, version = (time.perf_counter() - moment) * 1e3, 0
        try:
            connection.request("GET", f"/recommend/{quote(user, safe='')}?k={k}", headers=headers)
            answer = connection.getresponse()
            body, status = answer.read(), str(answer.status)
            if status == "200":
                version = json.loads(body)["version"]
        except (OSError, HTTPException) as why:
            status = type(why).__name__
            connection.close()
        found.append(((time.perf_counter() - moment) * 1e3, late, status, version))
    connection.close()
