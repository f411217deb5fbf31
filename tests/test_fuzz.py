"""A damaged file of a store or a delivery gives an exit code and a message, or has no effect."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_nightly import days, n_learned

from freshrec.cli.app import main
from freshrec.nightly.job import NightlyJob
from freshrec.recommender.bundle import read_bundle
from freshrec.store.versions import open_store, version_chain

CODES = {0, 2, 3, 6, 7, 8, 9}
WORDS = [b"", b"nan", b"-1", b"1e400", b"99999999999999999999", b'"', b"\x00", b"\xff\xfe", b",", b"\n", b"null", b"{}"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two versions in `s`, and the files of its log beside it."""
    base, one, two, *_ = days()
    for name, frame in (("base", base), ("one", one), ("two", two)):
        frame.write_parquet(tmp_path / f"{name}.parquet")
        frame.write_csv(tmp_path / f"{name}.csv")
    at = ["--store", str(tmp_path / "s")]
    assert main(["fit", str(tmp_path / "base.parquet"), *at, "--model", "popularity"]) == 0
    assert main(["update", str(tmp_path / "one.parquet"), *at, "--force", "--reason", "it is small"]) in (0, 8)
    return tmp_path


def harm(path: Path, source: np.random.Generator) -> str:
    """Change a file at random. Returns a description of the change."""
    whole = path.read_bytes()
    deed = source.choice(["flip", "flip", "flip", "cut", "empty", "insert", "double", "gone"])
    at = int(source.integers(max(1, len(whole))))
    if deed == "flip" and whole:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << source.integers(8))]) + whole[at + 1 :])
    elif deed == "insert":
        path.write_bytes(whole[:at] + WORDS[source.integers(len(WORDS))] + whole[at:])
    elif deed == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:at], "empty": b"", "double": whole + whole}.get(deed, whole))
    return f"{deed} at {at} of {path.name}"


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command. Returns the exit code and the output, which has a message if the command failed."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code in CODES and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (len(lines) == 1) == (code != 0), err
    return code, out


def harmed_stores(folder: Path, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Query and update stores in which one file is damaged."""
    ask = ("recommend", "1", "2", "3", "--k", "5", "--json", "--store")
    right, source = answer(capsys, *ask, str(folder / "s"))[1], np.random.default_rng(0)
    files = sorted(path.relative_to(folder) for path in (folder / "s").rglob("*") if path.is_file())
    for i in range(n):
        shutil.rmtree(folder / "t", ignore_errors=True)
        shutil.copytree(folder / "s", folder / "t")
        path = folder / "t" / files[i % len(files)].relative_to("s")
        done = harm(path, source)
        code, out = answer(capsys, *ask, str(folder / "t"))
        assert code or out == right, done
        for command in ("status", "history", "doctor"):
            answer(capsys, command, "--json", "--store", str(folder / "t"))
        if i % 3:
            continue
        code, out = answer(capsys, "update", str(folder / "two.parquet"), "--store", str(folder / "t"), "--json")
        if code == 0:
            version = json.loads(out)[0]
            assert version["numbers"]["new_events"] == 300, done
        if code in (0, 8):
            assert open_store(folder / "t").find_damage(open_store(folder / "t").live) == [], done


def harmed_deliveries(folder: Path, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Deliver damaged files. A file that is accepted is a log, and the store stays intact."""
    source, reasons = np.random.default_rng(1), set()
    shutil.copytree(folder / "s", folder / "u")
    for i in range(n):
        path = folder / f"bad.{('csv', 'parquet')[i % 2]}"
        shutil.copy(folder / f"two{path.suffix}", path)
        harm(path, source)
        code, _ = answer(capsys, "update", str(path), "--dry-run", "--store", str(folder / "u"))
        reasons.add(code)
        if i % 10 == 0:
            answer(capsys, "update", str(path), "--store", str(folder / "u"))
            answer(capsys, "doctor", "--store", str(folder / "u"))
            kept = open_store(folder / "u")
            batches = [version.batch for version in version_chain(kept) if version.batch is not None]
            assert n_learned(read_bundle(kept.verified_files(kept.live))) == len(NightlyJob(kept).log.read(batches))
    assert {0, 3} <= reasons


def test_a_damaged_store_is_an_error_or_answers_correctly(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmed_stores(store, 60, capsys)


def test_a_damaged_delivery_is_an_error_or_accepted_completely(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmed_deliveries(store, 60, capsys)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_damages_are_errors_or_have_no_effect(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmed_stores(store, 4000, capsys)
    harmed_deliveries(store, 6000, capsys)
