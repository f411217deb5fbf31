"""Helpers for tests of serving: a small store, and a server of it in this process."""

from __future__ import annotations

import atexit
import gc
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
from starlette.testclient import TestClient

from freshrec.cli.app import main
from freshrec.data.synthetic import make_world
from freshrec.nightly.erase import erase_user
from freshrec.nightly.job import NightlyJob
from freshrec.server import live_version
from freshrec.server.app import create_app
from freshrec.server.live_version import LiveVersion
from freshrec.server.middleware import ServerLimits
from freshrec.server.service import Service
from freshrec.store.versions import open_store

TOKEN = "a-token-of-the-tests"
ANY = ["--force", "--reason", "a test"]


def days(n: int = 2) -> list[pl.DataFrame]:
    """A base of 1,500 events and `n` days of 300, with text ids and categories."""
    frame = make_world("drift", users=100, items=50, events=1500 + n * 300).log.frame.select(
        "user_id", "item_id", "time"
    )
    frame = frame.select(
        user_id="user-" + pl.col("user_id").cast(pl.String),
        item_id="item-" + pl.col("item_id").cast(pl.String),
        timestamp="time",
        category=(pl.col("item_id") % 3).cast(pl.String),
    )
    return [frame[:1500], *(frame[1500 + i * 300 : 1800 + i * 300] for i in range(n))]


def stored(folder: Path, model: str = "item-knn", strategy: str | None = None, n: int = 1) -> list[pl.DataFrame]:
    """Make a store with `n` versions in `folder`/s. Returns the base and the days."""
    shutil.copytree(_prepared(model, strategy, n), folder, dirs_exist_ok=True)
    return days()


@cache
def _prepared(model: str, strategy: str | None, n: int) -> Path:
    """Make a folder with such a store, once per process. Tests get copies of it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if n > 1:
        shutil.copytree(_prepared(model, strategy, n - 1), folder, dirs_exist_ok=True)
        assert run("update", folder, str(folder / f"day-{n - 1}.parquet"), *ANY) == 0
        return folder
    for i, frame in enumerate(days()):
        frame.write_parquet(folder / f"day-{i}.parquet")
    way = [] if strategy is None else ["--strategy", strategy]
    assert run("fit", folder, str(folder / "day-0.parquet"), "--model", model, *way) == 0
    return folder


def run(command: str, folder: Path, *words: str) -> int:
    """Run a command on the store. Returns its exit code."""
    return main([command, *words, "--store", str(folder / "s")])


@contextmanager
def server(
    folder: Path,
    rules: ServerLimits = ServerLimits(max_requests_per_s=0),  # noqa: B008
    sign_key_file: Path | None = None,
    **of_live: Any,
) -> Iterator[tuple[TestClient, LiveVersion]]:
    """A client of a server of the store, and what it serves from.

    A real server collects garbage when a version is loaded or dropped. Here that would search everything that the tests
    have imported, which takes half a second each time.
    """
    said: list[str] = []
    live = LiveVersion(open_store(folder / "s", sign_key_file), said.append, **of_live)
    live.said = said  # type: ignore[attr-defined]

    def erased(user: str) -> dict[str, Any]:
        store = open_store(folder / "s")
        with store.locked():
            return erase_user(NightlyJob(store), user)

    with patch.object(live_version, "release_memory", gc.collect):
        live.start()
        app = create_app(Service(live, rules, erased))
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client, live


def items(answer: Any) -> list[str]:
    """Return the item ids of a list."""
    assert answer.status_code == 200, answer.text
    return [one["item_id"] for one in answer.json()["items"]]


def click(client: TestClient, user: str, item: str, **more: Any) -> Any:
    """Send a click. Returns its acknowledgement."""
    answer = client.post("/events", json={"events": [{"user_id": user, "item_id": item, **more}]})
    assert answer.status_code == 200, answer.text
    return answer.json()["events"][0]


@contextmanager
def process(folder: Path, *words: str, wait_s: float = 60) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `freshrec serve` in a separate process on a free port. Yields its address and the process."""
    command = [sys.executable, "-m", "freshrec", "serve", "--store", str(folder / "s"), "--port", "0", *words]
    with listening(command, folder / "serve.log", wait_s) as found:
        yield found


@contextmanager
def listening(
    command: Sequence[str],
    log_path: Path,
    wait_s: float = 60,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a command that serves, and wait until it listens. Yields its address and the process."""
    log = log_path.open("a+")
    since = len(log_path.read_text())
    with log, subprocess.Popen(command, stderr=log, stdout=log, text=True, cwd=cwd, env=env) as running:
        try:
            until = time.monotonic() + wait_s
            said: list[str] = []
            while not said:
                assert running.poll() is None and time.monotonic() < until, log_path.read_text()
                time.sleep(0.05)
                said = re.findall(r"listening on (http://[\d.:]+)", log_path.read_text()[since:])
            yield said[0], running
        finally:
            running.terminate()
            running.wait(20)
