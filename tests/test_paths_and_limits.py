"""Names of folders, existing files, readers that go away, floods of clicks, and little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from freshrec import Recommender, memory_limits
from freshrec.cli.app import main
from freshrec.data.log import read_log
from freshrec.errors import OptionError, OutOfMemoryError, StateError
from freshrec.server.known_clicks import KnownClicks
from freshrec.server.live_version import LiveVersion
from freshrec.store.click_journal import Click
from freshrec.store.event_log import EventLog
from freshrec.store.versions import open_store

DAY, START, SECOND = 86_400, 1_700_000_000, 1_000_000


def write_log(path: Path, day: int, n_rows: int = 200, bad: bool = False) -> Path:
    """Write a log of 5 users and 7 items. `bad`: the last row lacks its item."""
    rows = range(n_rows)
    items = [None if bad and row == n_rows - 1 else row % 7 for row in rows]
    times = [START + day * DAY + row for row in rows]
    pl.DataFrame({"user_id": [row % 5 for row in rows], "item_id": items, "timestamp": times}).write_csv(path)
    return path


def fit(folder: Path, name: str = "shop") -> str:
    log = write_log(folder / "log.csv", 0)
    assert main(["fit", str(log), "--store", str(folder / name), "--model", "popularity"]) == 0
    return str(folder / name)


# existing files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["python", "validate", "fit", "link"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_an_existing_file_is_not_replaced_by_bad_rows(tmp_path: Path, way: str, ending: str) -> None:
    log, mine, other = (
        write_log(tmp_path / "log.csv", 0, bad=True),
        tmp_path / f"b.{ending}",
        tmp_path / f"b-1.{ending}",
    )
    if way == "link":
        mine.symlink_to(tmp_path / "elsewhere")
    else:
        mine.write_text("my own file")
    if way in ("python", "link"):
        assert f"Wrote 1 bad row to {other.name}." in read_log(log, quarantine=mine).notes
    else:
        store = ["--store", str(tmp_path / "s"), "--model", "popularity"] if way == "fit" else []
        assert main([way, str(log), "--quarantine", str(mine), *store]) == 0
    assert not (tmp_path / "elsewhere").exists() and (way == "link" or mine.read_text() == "my own file")
    rows = pl.read_csv(other) if ending == "csv" else pl.read_parquet(other)
    assert rows["user_id"].cast(pl.Int64).to_list() == [199 % 5]  # the last row


# names of folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "a*b", "100%", "a{b}'\"", "é=b:c"])
def test_a_store_may_have_this_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    store = fit(tmp_path / name)
    new = write_log(tmp_path / name / "new.csv", 1)
    for command in (["update", str(new)], ["recommend", "1"], ["history"], ["doctor"], ["erase", "1"], ["status"]):
        assert main([*command, "--store", store]) == 0, command
    live = LiveVersion(open_store(Path(store)), print)
    live.start()
    live.stop()


@pytest.mark.parametrize(
    ("name", "shown"),
    [(f"a{sign}b", f'"{sign}"') for sign in "#?[]|^\\"] + [("a%20b", '"%20"'), ("a\nb", "a control character")],
)
def test_fit_refuses_a_folder_that_the_event_log_misreads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, shown: str
) -> None:
    log = write_log(tmp_path / "log.csv", 0)
    assert main(["fit", str(log), "--store", str(tmp_path / name / "shop")]) == OptionError.exit_code
    assert f"holds {shown}, which the event log does not support. Choose another" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [log]  # nothing was made


def test_a_store_that_was_moved_to_such_a_folder_still_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a[1]").mkdir()
    moved = Path(fit(tmp_path)).rename(tmp_path / "a[1]" / "shop")
    assert main(["recommend", "1", "--store", str(moved)]) == 0
    new = write_log(tmp_path / "new.csv", 1)
    for command in (["update", str(new)], ["erase", "1"]):
        assert main([*command, "--store", str(moved)]) == StateError.exit_code
        assert "Move the store to another folder." in capsys.readouterr().err
    with pytest.raises(StateError, match="which the event log does not support"):
        EventLog(moved / "log").read()
    assert len(Recommender.load(moved).recommend(1, k=3, exclude_seen=False)) == 3


# readers that go away ------------------------------------------------------------------------------------------------


def run_without_reader(arguments: list[str], stream: str) -> tuple[int, str]:
    """Run a command whose stdout or stderr nobody reads. Returns its exit code and the other stream."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-m", "freshrec", *arguments], text=True, **streams)  # type: ignore[call-overload]
    os.close(writer)
    return done.returncode, done.stderr if stream == "stdout" else done.stdout


def test_an_update_completes_although_nobody_reads_its_output(tmp_path: Path) -> None:
    store = fit(tmp_path)
    new = [str(write_log(tmp_path / f"n{day}.csv", day)) for day in (1, 2)]
    code, errors = run_without_reader(["update", *new, "--store", store], "stdout")
    assert (code, "Traceback" in errors) == (0, False)
    assert [manifest.id for manifest in open_store(Path(store)).manifests()] == [1, 2, 3]


@pytest.mark.parametrize(("command", "code"), [("history", 0), ("recommend", 7)])
def test_a_closed_pipe_does_not_change_the_exit_code(tmp_path: Path, command: str, code: int) -> None:
    store = str(tmp_path / "none") if code else fit(tmp_path)
    asked = [command, "1"] if command == "recommend" else [command]
    found, output = run_without_reader([*asked, "--store", store], "stderr" if code else "stdout")
    assert (found, "Traceback" in output) == (code, False)


# floods of clicks ----------------------------------------------------------------------------------------------------


def test_the_history_of_a_user_is_read_once_per_request_and_not_once_per_click(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pl.int_range(2_000, eager=True)
    log = pl.DataFrame({"user_id": rows * 0 + 7, "item_id": rows % 50, "timestamp": START + rows})
    log.write_parquet(tmp_path / "log.parquet")
    store = tmp_path / "shop"
    assert main(["fit", str(tmp_path / "log.parquet"), "--store", str(store), "--model", "popularity"]) == 0
    live, reads = LiveVersion(open_store(store), print), list[int]()
    live.start()
    original = KnownClicks._in_histories
    monkeypatch.setattr(
        KnownClicks, "_in_histories", lambda known, clicks: reads.append(1) or original(known, list(clicks))
    )
    for nth in range(3):
        when = [(START + 300_000 + 1_000 * nth + place) * SECOND for place in range(1_000)]
        outcomes = live.accept_clicks([Click(7, place % 50, time) for place, time in enumerate(when)])[1]
        assert not any(outcome.is_duplicate for outcome in outcomes)
    assert len(reads) == 3
    learned = [Click(7, 3, (START + 3) * SECOND), Click(7, 4, (START + 3) * SECOND), Click(9, 3, (START + 3) * SECOND)]
    assert [outcome.is_duplicate for outcome in live.accept_clicks(learned)[1]] == [True, False, False]
    live.stop()


# little memory -------------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_fit_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, store = write_log(tmp_path / "log.csv", 0), tmp_path / "shop"
    monkeypatch.setattr(memory_limits, "available_memory", lambda: 200 * 300 - 1)  # 300 bytes for each of 200 rows
    assert main(["fit", str(log), "--store", str(store), "--model", "popularity"]) == OutOfMemoryError.exit_code
    assert "log.csv has 200 rows, which need at least" in capsys.readouterr().err
    assert not store.exists()
    with pytest.raises(OutOfMemoryError, match="use a shorter log"):
        Recommender("popularity").fit(log)
    monkeypatch.setattr(memory_limits, "available_memory", lambda: 200 * 300)
    assert main(["fit", str(log), "--store", str(store), "--model", "popularity"]) == 0


@pytest.mark.parametrize(
    "problem",
    [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_failed_request_for_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fail(*_: object) -> None:
        raise problem

    log = write_log(tmp_path / "log.csv", 0)
    monkeypatch.setattr("freshrec.recommender.recommender.learn_events", fail)
    with pytest.raises(OutOfMemoryError, match="There is not enough memory"):
        Recommender("popularity").fit(log)
    monkeypatch.setattr("freshrec.cli.app.validate_log", fail)
    assert main(["validate", str(log), "--json"]) == OutOfMemoryError.exit_code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"].startswith("There is not enough memory.") and "Traceback" not in err


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"), memory_limits.naming_memory_shortage():
        raise RuntimeError("shapes differ")


def test_a_low_limit_of_address_space_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", 0)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))"
    code = f"from freshrec.cli.app import main\n{limit}\nraise SystemExit(main(['fit', {str(log)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == OutOfMemoryError.exit_code and not done.stdout
    assert done.stderr.startswith("error: The limit of address space (ulimit -v) is 1.0 GiB, but `freshrec fit` needs")


def test_the_memory_that_is_left_is_at_most_that_of_the_machine(tmp_path: Path) -> None:
    available = memory_limits.available_memory()
    assert available is None or available > 0
    for name, text in {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\nfile 50\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory_limits._cgroup(tmp_path) == 350  # 1000 - 700, and the 50 that are a cache
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limits._cgroup(tmp_path) is None
    assert memory_limits._soft_limit() is None or resource.getrlimit(resource.RLIMIT_AS)[0] > 0
