"""Folders that version 0.1.0 wrote (commit 844d548, tests/gold/write_stores.py) open, learn, serve and continue."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from freshrec.cli.app import main
from freshrec.former_names import FORMER
from freshrec.recommender.recommender import Recommender

GOLD = Path(__file__).parent / "gold"
KNOWN: dict[str, Any] = json.loads((GOLD / "known-0.1.0.json").read_text())
STORES = [name for name in KNOWN if name.startswith("store")]
REPLAYS = [name for name in KNOWN if name.startswith("replay")]
HOUR, FIRST = 3600, 1_750_000_000  # as in write_stores.py
LAST = {"store-0.1.0-blend": 401, "store-0.1.0-comirec-dr": 160}  # the hour after its newest event; 140 in the others


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lists_of(capsys: pytest.CaptureFixture[str], store: Path, *users: str) -> dict[str, list[tuple[str, float]]]:
    """user -> items and scores, best first."""
    found: dict[str, list[tuple[str, float]]] = {user: [] for user in users}
    for row in said(capsys, "recommend", *users, "-k", "5", "--store", str(store)):
        found[str(row["user_id"])].append((str(row["item_id"]), row["score"]))
    return found


def write_day(name: str, path: Path) -> str:
    """Ten events, an hour apart, after those of the store. User 1 and the new user 77 interact with item 12."""
    form = KNOWN[name]["form"]
    user, item = ("", "") if form == "numbers" else ("u", "i")
    rows = [
        (user + str(u), item + str(i)) for u, i in [(1, 12), (77, 12), (77, 3), *((u, u % 11 + 1) for u in range(2, 9))]
    ]
    first = LAST.get(name, 140)
    times = [14 + nth // 10 if form == "no clock" else FIRST + HOUR * (first + nth) for nth in range(len(rows))]
    head = ["user_id", "item_id", "period" if form == "no clock" else "timestamp"]
    lines = [head, *([u, i, str(time)] for (u, i), time in zip(rows, times))]
    path.write_text("".join(",".join(line) + "\n" for line in lines))
    return user


@pytest.mark.parametrize("name", STORES)
def test_a_store_of_0_1_0_gives_the_same_answers_and_learns_and_serves_a_day(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    shutil.copytree(GOLD / name, store)
    then = {
        user: [(item, pytest.approx(score, rel=1e-4)) for item, score in found]
        for user, found in KNOWN[name]["lists"].items()
    }
    assert lists_of(capsys, store, *then) == then
    spans = Recommender.load(store).served.state.spans_seen
    user, at = write_day(name, tmp_path / "day.csv"), ["--store", str(store)]
    waiting = 2 if name.endswith("blend") else 0  # clicks, one of them by a new user
    [version] = said(capsys, "update", str(tmp_path / "day.csv"), *at, "--force", "--reason", "a small delivery")
    assert version["numbers"]["new_events"] == 10 + waiting and version["goes_live"]
    now = Recommender.load(store).served
    assert now.state.spans_seen == spans + 1
    found = lists_of(capsys, store, f"{user}1", f"{user}77", f"{user}99")
    assert all(found.values())
    item = "12" if user == "" else "i12"
    assert item not in [one for one, _ in found[f"{user}1"]]  # seen items are excluded
    seen = said(capsys, "inspect", "user", f"{user}77", *at)["events"]
    assert [str(one["item_id"]) for one in seen] == [item, "3" if user == "" else "i3"]


def test_versions_moves_and_clicks_of_0_1_0_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "s"
    shutil.copytree(GOLD / "store-0.1.0-blend", store)
    at = ["--store", str(store)]
    history = said(capsys, "history", *at)
    versions = {one["id"]: one for one in history["versions"]}
    assert sorted(versions) == [1, 2, 3, 4] and not versions[3]["promoted"]
    # 3 of 20 rows are late, and duplicates are skipped; version 4 is updated from 2, as 3 was refused
    assert (versions[4]["parent"], versions[4]["numbers"]["late"]) == (2, 3)
    assert said(capsys, "status", *at)["live"] == 4
    assert said(capsys, "diff", "1", "4", *at)["recipe"] == {}  # the same options
    assert main(["doctor", *at]) == 0 and main(["rollback", "2", "--reason", "a test", *at]) == 0
    assert main(["update", "--again", "3", "--force", "--reason", "a test", *at]) == 0
    assert main(["erase", "u1", *at]) == 0 and main(["doctor", *at]) == 0


@pytest.mark.parametrize("name", REPLAYS)
def test_an_unfinished_replay_of_0_1_0_resumes_and_ends_as_if_it_had_not_stopped(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    shutil.copytree(GOLD / name, out)
    bases = sorted(path.name for path in out.glob("bases/*.safetensors"))
    before = {path: path.read_bytes() for path in out.glob("*/*-[012].*")}  # finished parts stay unchanged
    words = ["replay", "--recipe", str(out / "recipe.toml"), "--data", str(out), "--out", str(out), "--resume"]
    said(capsys, *words)
    assert {path: path.read_bytes() for path in before} == before
    assert (
        sorted(path.name for path in out.glob("bases/*.safetensors")) == bases
    )  # every finished span was found, and none was trained again
    results = pl.read_parquet(out / "results.parquet").filter((pl.col("slice") == "all") & (pl.col("span") > 0))
    for way, metrics in KNOWN[name]["spans"].items():
        model, strategy = way.split("/")
        rows = results.filter((pl.col("model") == model) & (pl.col("strategy") == strategy))
        found = {(metric, span): value for metric, span, value in rows.select("metric", "span", "value").iter_rows()}
        known = {(metric, int(span)): value for metric, spans in metrics.items() for span, value in spans.items()}
        assert {span for _, span in known} == {1, 2, 3, 4}
        if strategy == "absorb":  # counting models give the same numbers to the end
            assert {key: found[key] for key in known} == pytest.approx(known, abs=1e-9), way
            continue
        # Training continues with random streams that 0.1.0 did not have. Up to the span after the last one that 0.1.0
        # finished, models of 0.1.0 are measured; on another processor their scores now and then move a rank.
        finished = [path for path in cell_folder(out, way).glob("costs-*.json") if path in before]
        done = max((int(path.stem.removeprefix("costs-")) for path in finished), default=0)
        then = {(metric, span): value for (metric, span), value in known.items() if span <= done + 1}
        assert {key: found[key] for key in then} == pytest.approx(then, abs=0.02), way
        assert found.keys() >= known.keys(), way  # the later spans exist too


def cell_folder(out: Path, way: str) -> Path:
    """The folder of a run with seed 0."""
    return out / f"{way.replace('/', '--').replace(':', '_')}--0"


def test_the_stores_hold_every_class_that_0_1_0_could_save() -> None:
    held = set[str]().union(*(about["classes"] for name, about in KNOWN.items() if name != "machine"))
    of_replays = {"freshrec.replay.replay:Cell", "freshrec.replay.replay:Settings", "freshrec.replay.measure:Asked"}
    before = {"freshrec.serve.recommender:Reading"}  # from folders older than stores: tests/gold/recommender-2
    assert held == FORMER.keys() - of_replays - before  # from replays: those in made-of.txt
