"""What every test may ask for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None)  # the same examples on every machine, at any speed
settings.load_profile("house")

LOGS = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def real_log() -> Callable[[str], Path]:
    """`real_log("uci_online_retail")`: the path of a real log; the test is skipped where the log is not there."""

    def find(name: str) -> Path:
        path = LOGS / f"{name}.parquet"
        if not path.exists():
            pytest.skip(f"needs the real log ../shared/data/{name}.parquet, which is not beside this checkout")
        return path

    return find
