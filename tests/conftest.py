"""Fixtures and settings shared by all tests."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cpu_instructions  # noqa: F401  # must come first, before torch
import pytest
from hypothesis import settings

from freshrec.store.checkpoint import save_state
from freshrec.types import State

settings.register_profile("house", derandomize=True, deadline=None)  # the same examples on every machine, at any speed
settings.load_profile("house")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude all imported objects from garbage collection.

    Every update of a replay first collects garbage, and searching all imported modules takes longer than most updates
    of the tests.
    """
    if len(session.items) > 500:  # importing it takes seconds, and the first optimizer does it anyway
        import torch._dynamo  # noqa: F401
    gc.collect()
    gc.freeze()


LOGS = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def real_log() -> Callable[[str], Path]:
    """`real_log("uci_online_retail")`: the path of a real log. Skips the test if the log is missing."""

    def find(name: str) -> Path:
        path = LOGS / f"{name}.parquet"
        if not path.exists():
            pytest.skip(f"needs the real log ../shared/data/{name}.parquet, which is not beside this checkout")
        return path

    return find


@pytest.fixture
def bits(tmp_path: Path) -> Callable[[State], bytes]:
    """`bits(state)`: the saved bytes of a state without its costs. Equal states have equal bytes."""

    def saved(state: State) -> bytes:
        path = tmp_path / "bits.safetensors"
        save_state(replace(state, costs={}), path)
        return path.read_bytes()

    return saved
