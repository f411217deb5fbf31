"""Benchmark a server: start it on a store, send requests, measure from outside, stop it."""

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
from freshrec.recommender.serving_bundle import SERVED_FILE, USERS_FILE, read_parquet_file
from freshrec.server.load_generator import generate_load
from freshrec.store.versions import Store

MB = 1 << 20


def run_benchmark(
    store: Store, rate: float, seconds: float, k: int, options: Sequence[str] = (), swap: bool = False
) -> dict[str, float | int | str]:
    """Measure a server under an open-loop load of `rate` requests per second.

    `options` are flags of `freshrec serve`. With `swap`, the live version changes twice meanwhile. Returns latencies in
    ms, errors, CPU time in ms per request and memory in MB. Raises StateError if the live version has no users.
    """
    users = read_parquet_file(store.verified_files(store.live)[USERS_FILE])["id"].drop_nulls().cast(pl.String).to_list()
    if not users:
        raise StateError(f"The live version of {store.folder} has no users. Fit it on a log with users first.")
    started_s = time.perf_counter()
    with running_server(store.folder, "--rate", "0", *options) as (url, pid):
        ready_s = time.perf_counter() - started_s
        generate_load(url, users, min(rate, 20.0), 2.0, k)  # warm-up: the first requests are slower
        idle_mb, peaks = resident_mb(pid), [0.0]
        stop = threading.Event()
        watcher = threading.Thread(target=_track_peak, args=(pid, peaks, stop))
        watcher.start()
        swapper = threading.Thread(target=_swap_versions, args=(store, seconds)) if swap else None
        if swapper is not None:
            swapper.start()
        cpu_used_s = process_cpu_s(pid)
        found = asdict(generate_load(url, users, rate, seconds, k))
        cpu_used_s = process_cpu_s(pid) - cpu_used_s
        if swapper is not None:
            swapper.join()
        stop.set()
        watcher.join()
        search = describe_search(url)
        final_mb = resident_mb(pid)
    found["wrong"] = ", ".join(f"{n} x {error}" for error, n in found["wrong"].items()) or "none"
    found["versions"] = ", ".join(map(str, found["versions"]))
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}
    return {
        "search": search,
        "ready_s": round(ready_s, 2),
        **rounded,
        "cpu_ms_a_request": round(1e3 * cpu_used_s / max(1, found["asked"]), 2),
        "memory_mb": round(idle_mb, 1),
        "memory_peak_mb": round(max(peaks), 1),
        "memory_after_mb": round(final_mb, 1),
        "without_a_store_mb": round(measure_baseline_mb(), 1),
        "vectors_mb": round(vector_bytes(store) / MB, 1),
    }


@contextmanager
def running_server(folder: Path, *options: str, wait_s: float = 120.0) -> Iterator[tuple[str, int]]:
    """Run `freshrec serve` on a free port. Yield its address and process id. Raises StateError if it does not start."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-P", "-m", "freshrec", "serve", "--store", str(folder), "--port", "0", *options]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                yield _wait_for_address(process, log, wait_s), process.pid
            finally:
                process.terminate()


def _wait_for_address(process: subprocess.Popen[bytes], log: Any, wait_s: float) -> str:
    """Wait until the server listens; return its address."""
    deadline = time.monotonic() + wait_s
    while True:
        log.seek(0)
        output = log.read()
        if found := re.search(r"listening on (http://[\d.]+:\d+)", output):
            return found[1]
        if process.poll() is not None or time.monotonic() > deadline:
            last = (output.strip().splitlines() or ["no output"])[-1]
            raise StateError(f"The server did not start: {last.removeprefix('error: ')}")
        time.sleep(0.02)


def describe_search(url: str) -> str:
    """Return the search method of the live version, and the reason for it."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=30)
    connection.request("GET", "/version")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return f"{found['search']['how']}: {found['search']['why']}"


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def process_cpu_s(pid: int) -> float:
    """CPU time of a process so far, in seconds. Unlike latencies, it does not depend on other processes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_baseline_mb() -> float:
    """Resident memory of a process that has imported the libraries of a server and serves nothing, in MB."""
    code = (
        "import torch, faiss, uvicorn, freshrec.server.app; from pathlib import Path; import os;"
        "print(int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20)"
    )
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return float(process.stdout)


def vector_bytes(store: Store) -> int:
    """Size of all item vectors and stored interests of the live version, in bytes."""
    from safetensors import safe_open

    n_bytes = 0
    with safe_open(store.verified_files(store.live)[SERVED_FILE], framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            if name.endswith(".packed"):
                n_bytes += 4 * shape[0] * shape[1] // 3
            elif name.endswith("users.vectors_SD"):
                n_bytes += 4 * shape[0] * shape[1]
    return n_bytes


def _track_peak(pid: int, peaks: list[float], stop: threading.Event) -> None:
    """Keep the largest resident memory in `peaks[0]`, measured every 20 ms."""
    while not stop.wait(0.02):
        peaks[0] = max(peaks[0], resident_mb(pid))


def _swap_versions(store: Store, seconds: float) -> None:
    """Switch to another version after a third of the time, and back after two thirds."""
    live = store.live
    other_version = next((manifest.id for manifest in reversed(store.manifests()) if manifest.id != live), live)
    for number in (other_version, live):
        time.sleep(seconds / 3)
        with store.locked():
            store.move_pointer(number, "promote", "bench")
