"""How a server of a store bears a load: started for it, measured from outside, stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl

from freshrec.errors import StateError
from freshrec.serve.load import bear
from freshrec.serve.saved import SERVED, USERS
from freshrec.store.versions import Store, open_store

MB = 1 << 20


def measured(
    folder: Path, rate: float, seconds: float, k: int, options: Sequence[str] = (), swap: bool = False
) -> dict[str, float | int | str]:
    """Latencies in milliseconds, errors, memory in MB, of an open-loop load on a server started with these options."""
    store = open_store(folder)
    users = pl.read_parquet(store.files(store.live)[USERS])["id"].drop_nulls().cast(pl.String).to_list()
    if not users:
        raise StateError(f"the live version of {folder} knows no user; nobody can be asked for.")
    since = time.perf_counter()
    with server_of(folder, "--rate", "0", *options) as (url, pid):
        ready_s = time.perf_counter() - since
        bear(url, users, min(rate, 20.0), 2.0, k)  # what is asked first is slower
        at_rest, peaks = resident(pid), [0.0]
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(pid, peaks, over))
        watching.start()
        moving = threading.Thread(target=_move, args=(store, seconds)) if swap else None
        if moving is not None:
            moving.start()
        worked = cpu_s(pid)
        found = asdict(bear(url, users, rate, seconds, k))
        worked = cpu_s(pid) - worked
        if moving is not None:
            moving.join()
        over.set()
        watching.join()
        search = said_of(url)
        after = resident(pid)
    found["wrong"] = ", ".join(f"{n} x {what}" for what, n in found["wrong"].items()) or "none"
    found["versions"] = ", ".join(map(str, found["versions"]))
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}
    return {
        "search": search,
        "ready_s": round(ready_s, 2),
        **rounded,
        "cpu_ms_a_request": round(1e3 * worked / max(1, found["asked"]), 2),
        "memory_mb": round(at_rest, 1),
        "memory_peak_mb": round(max(peaks), 1),
        "memory_after_mb": round(after, 1),
        "without_a_store_mb": round(empty(), 1),
        "vectors_mb": round(vector_bytes(store) / MB, 1),
    }


@contextmanager
def server_of(folder: Path, *words: str, wait_s: float = 120.0) -> Iterator[tuple[str, int]]:
    """`freshrec serve` on a free port: its address, and its process. StateError where it does not come up."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "freshrec.cli", "serve", "--store", str(folder), "--port", "0", *words]
        with subprocess.Popen(command, stdout=log, stderr=log) as running:
            try:
                yield _address(running, log, wait_s), running.pid
            finally:
                running.terminate()


def _address(running: subprocess.Popen[bytes], log: Any, wait_s: float) -> str:
    until = time.monotonic() + wait_s
    while True:
        log.seek(0)
        said = log.read()
        if found := re.search(r"listening on (http://[\d.]+:\d+)", said):
            return found[1]
        if running.poll() is not None or time.monotonic() > until:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise StateError(f"the server did not come up: {last.removeprefix('error: ')}")
        time.sleep(0.02)


def said_of(url: str) -> str:
    """How the live version is searched, in the server's words."""
    place = urlsplit(url)
    assert place.hostname is not None
    connection = HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request("GET", "/version")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return f"{found['search']['how']}: {found['search']['why']}"


def resident(pid: int) -> float:
    """MB of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has worked for: unlike latencies, they do not depend on who else does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def empty() -> float:
    """MB of a process that has imported all that a server needs, and serves nothing."""
    code = (
        "import torch, faiss, uvicorn, freshrec.serve.http; from pathlib import Path; import os;"
        "print(int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def vector_bytes(store: Store) -> int:
    """Bytes of all item vectors and stored interests of the live version."""
    from safetensors import safe_open

    n_bytes = 0
    with safe_open(store.files(store.live)[SERVED], framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            if name.endswith(".packed"):
                n_bytes += 4 * shape[0] * shape[1] // 3
            elif name.endswith("users.vectors_SD"):
                n_bytes += 4 * shape[0] * shape[1]
    return n_bytes


def _watch(pid: int, peaks: list[float], over: threading.Event) -> None:
    while not over.wait(0.02):
        peaks[0] = max(peaks[0], resident(pid))


def _move(store: Store, seconds: float) -> None:
    """Point to another version a third of the way, and back after two thirds."""
    live = store.live
    other = next((manifest.id for manifest in reversed(store.versions()) if manifest.id != live), live)
    for number in (other, live):
        time.sleep(seconds / 3)
        with store.locked():
            store.point(number, "promote", "bench")
