"""Forked processes: an error at once instead of waiting for threads that do not exist there."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from freshrec import forks, make_world, read_log, split_log
from freshrec.data.split_config import SplitConfig
from freshrec.data.validate import validate_log
from freshrec.errors import StateError
from freshrec.recommender.recommender import Recommender

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
]
T = 1_700_000_000
LIMIT_S = 20.0  # a process that hangs is ended after this time
LOG = pl.DataFrame(
    {"user_id": [1, 1, 2, 2, 3], "item_id": [1, 2, 1, 3, 2], "timestamp": [T, T + 1, T + 2, T + 3, T + 4]}
)
NEW = pl.DataFrame({"user_id": [3], "item_id": [3], "timestamp": [T + 5]})


@pytest.fixture(scope="module")
def fitted() -> Recommender:
    return Recommender("item-knn").fit(LOG)


def said_in_child(call: Callable[[], object]) -> str:
    """What a forked process says about a call: "fine", or the error. Fails if it hangs."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        text = "fine"
        try:
            call()
        except Exception as problem:  # noqa: BLE001
            text = f"{type(problem).__name__}: {problem}"
        os.write(into, text.encode())
        os._exit(0)
    os.close(into)
    has_said, _, _ = select.select([out], [], [], LIMIT_S)
    if not has_said:
        os.kill(child, signal.SIGKILL)
    text = os.read(out, 10_000).decode()
    os.waitpid(child, 0)
    os.close(out)
    assert has_said, "the child hangs"
    return text


CALLS: dict[str, Callable[[Recommender, Path], object]] = {
    "recommend": lambda fitted, store: fitted.recommend(1),
    "similar_items": lambda fitted, store: fitted.similar_items(1),
    "explain": lambda fitted, store: fitted.explain(1, 3),
    "evaluate": lambda fitted, store: fitted.evaluate(NEW),
    "update": lambda fitted, store: fitted.update(NEW),
    "save": lambda fitted, store: fitted.save(store / "new"),
    "load": lambda fitted, store: Recommender.load(store),
    "fit": lambda fitted, store: Recommender("popularity").fit(LOG),
    "read_log": lambda fitted, store: read_log(LOG),
    "make_world": lambda fitted, store: make_world("repeat", users=50, items=40, events=400, spans=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_after_a_fork_is_an_error_that_says_what_to_do(name: str, fitted: Recommender, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    said = said_in_child(lambda: CALLS[name](fitted, tmp_path))
    assert said.startswith("StateError: This process was forked after") and "spawn" in said
    assert fitted.recommend(1, k=1).height == 1  # the parent goes on


def test_a_log_that_was_read_before_a_fork_is_an_error_too() -> None:
    log = read_log(LOG)
    for call in (lambda: validate_log(log), lambda: split_log(log, SplitConfig(spans=2))):
        assert said_in_child(call).startswith("StateError: This process was forked")


def test_the_child_of_a_child_gets_the_error_too(fitted: Recommender) -> None:
    def grandchild() -> None:
        raise RuntimeError(said_in_child(lambda: fitted.recommend(1)))

    assert said_in_child(grandchild).startswith("RuntimeError: StateError: This process was forked")


def test_without_a_list_of_threads_the_first_call_counts(
    fitted: Recommender, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forks, "THREADS", tmp_path / "missing")  # as on macOS
    assert fitted.recommend(1).height
    assert said_in_child(lambda: fitted.recommend(1)).startswith("StateError: This process was forked")


def load_in_worker(folder: Path) -> int:
    return Recommender.load(folder).recommend(1).height


def test_a_pool_of_forked_workers_gets_the_error(fitted: Recommender, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(StateError, match="forked after"):
        pool.apply_async(load_in_worker, (tmp_path,)).get(timeout=LIMIT_S)


SCRIPT = """
import os, sys
import polars as pl
from freshrec import Recommender
def child(what):
    if not os.fork():
        try:
            print(what, Recommender.load(sys.argv[1]).recommend(1, k=2).height, flush=True)
        except Exception as problem:
            print(what, type(problem).__name__, flush=True)
        os._exit(0)
    os.wait()
child("before the first use:")
pl.DataFrame({"a": [3, 1, 2]}).filter(pl.col("a") > 1)
child("after a query of polars:")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the threads of a process")
def test_a_fork_before_the_first_use_works(fitted: Recommender, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # user 1 has items 1 and 2 of three, so one item is left
    assert found.stdout.splitlines() == ["before the first use: 1", "after a query of polars: StateError"], found.stderr
