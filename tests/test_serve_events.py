"""Clicks: on disk before they are acknowledged, in the next list at once, and learned by an update exactly once."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from serving import ANY, TOKEN, click, items, run, server, stored

from freshrec.cli.server import erase_in_subprocess
from freshrec.data.histories import concat_events
from freshrec.data.log import read_log
from freshrec.errors import StateError
from freshrec.models.absorb import absorb_block
from freshrec.nightly import click_intake as nightly
from freshrec.nightly.job import NightlyJob
from freshrec.recommender.bundle import read_bundle
from freshrec.recommender.ids import resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.recommender.log_reading import encode_events
from freshrec.server.middleware import ServerLimits
from freshrec.store import click_journal as journal
from freshrec.store.click_journal import Click, ClickJournal
from freshrec.store.event_log import EventLog
from freshrec.store.versions import open_store

NOON = 1_790_000_000  # seconds, after all of the world's events
IMSR = "imsr:fit.base_epochs=1:fit.epochs=1"


def rows(folder: Path) -> pl.DataFrame:
    return EventLog(folder / "s" / "log").read()


def waiting(folder: Path) -> list[Click]:
    return [one for file in journal.read_journal(folder / "s") for one in file.clicks]


@pytest.mark.parametrize(("model", "strategy"), [("item-knn", None), ("blend", None), ("comirec-dr:d=8", IMSR)])
def test_a_click_changes_the_next_list_and_nothing_is_trained_for_it(
    model: str, strategy: str | None, tmp_path: Path
) -> None:
    stored(tmp_path, model, strategy)
    with server(tmp_path) as (client, live):

        def of_model(user: str) -> dict[str, float]:
            found = client.get(f"/recommend/{user}?k=50&exclude_seen=false").json()["items"]
            return {one["item_id"]: one["score"] for one in found if one["fallback"] is None}

        before, other = of_model("user-1"), of_model("user-2")
        best = items(client.get("/recommend/user-1"))[0]
        weights = live.version.served.state.model.state_dict() if live.version else {}
        told = click(client, "user-1", best, timestamp=NOON)
        assert told == {"event_id": None, "timestamp": NOON * 10**6, "known": False, "folded": True, "why": None}
        assert best not in items(client.get("/recommend/user-1"))
        assert of_model("user-1") != before and of_model("user-2") == other
        assert live.version is not None
        now = live.version.served.state.model.state_dict()
        assert all(torch.equal(now[name].nan_to_num(), weight.nan_to_num()) for name, weight in weights.items())
        # a stranger is known from the first click on
        assert client.get("/recommend/neu").json()["fallback"] == "unknown user"
        click(client, "neu", best, timestamp=NOON)
        assert client.get("/recommend/neu?k=3").json()["fallback"] != "unknown user"
        assert client.get("/users/neu/interests").json()["n_fresh"] == 1


def test_lists_with_clicks_equal_lists_of_a_version_with_these_events(tmp_path: Path) -> None:
    # The same clicks as pending events of a copy of the store give the same lists.
    stored(tmp_path, "comirec-dr:d=8", IMSR)
    with server(tmp_path) as (client, live):
        for n, item in enumerate(("item-3", "item-4", "item-3", "item-9")):
            click(client, "user-1", item, timestamp=NOON + n)
        assert live.version is not None
        served = read_bundle(live.store.verified_files(1)).served
        frame = pl.DataFrame(
            {"user_id": ["user-1"] * 4, "item_id": ["item-3", "item-4", "item-3", "item-9"],
             "time": [(NOON + n) * 10**6 for n in range(4)]}
        )  # fmt: skip
        new = encode_events(served, frame)
        pending = concat_events((served.pending, new.events))
        counts = absorb_block(served.counts, new.events, len(new.users), len(new.items))
        whole = replace(served, pending=pending, counts=counts)
        row = served.users.rows(pl.Series(["user-1"]))
        for seen in (True, False):
            wanted = resolve_request(whole, ListRequest(k=20, exclude_seen=seen))
            expected = top_items(whole, row, wanted)
            found = client.get("/recommend/user-1", params={"k": 20, "exclude_seen": seen}).json()["items"]
            assert [one["score"] for one in found] == expected["score"].to_list()


def test_a_late_click_is_sorted_into_the_history(tmp_path: Path) -> None:
    base, *_ = stored(tmp_path, "repeat-last")
    own = base.filter(pl.col("user_id") == "user-1")
    first = own["timestamp"][0]
    with server(tmp_path) as (client, _):
        click(client, "user-1", "item-2", timestamp=first // 1000 - 5000)
        events = client.get("/users/user-1/interests").json()["events"]
        assert [one["item_id"] for one in events] == ["item-2", *own["item_id"]]
        best = items(client.get("/recommend/user-1?k=1&exclude_seen=false"))
        assert best == [own["item_id"][-1]]  # the last one is still the last


def test_an_update_learns_each_click_once_even_if_the_nightly_file_has_it(tmp_path: Path) -> None:
    _, day, _ = stored(tmp_path)
    with server(tmp_path) as (client, live):
        for user, item, when in day.select("user_id", "item_id", "timestamp").head(40).iter_rows():
            assert not click(client, user, item, timestamp=when // 1000)["known"]
        again = day.row(0, named=True)
        assert click(client, again["user_id"], again["item_id"], timestamp=again["timestamp"] // 1000)["known"]
        click(client, "user-1", "item-1", timestamp=NOON, event_id="e1")
        assert click(client, "user-1", "item-1", timestamp=NOON + 9, event_id="e1")["known"]
        click(client, "user-2", "item-2", timestamp=NOON)  # in no file
        exact = day.with_columns(timestamp=pl.col("timestamp") // 1000 * 1000, event_id=pl.lit(None, pl.String))
        named = exact[:1].with_columns(
            user_id=pl.lit("user-1"), item_id=pl.lit("item-1"), event_id=pl.lit("e1"), timestamp=NOON * 10**6 + 5
        )
        pl.concat([exact, named]).write_parquet(tmp_path / "night.parquet")
        assert run("update", tmp_path, str(tmp_path / "night.parquet"), *ANY) == 0
        log = rows(tmp_path)
        assert len(log) == 1500 + 300 + 2  # the day, e1, and the click that is in no file
        assert log.select("user_id", "item_id", "time", "event_id").is_unique().all()
        about = open_store(tmp_path / "s").manifest(2)
        assert about.data["day"]["share_doubled"] == 0 and about.data["day"]["share_known"] == 0
        live.refresh()
        assert live.version is not None and live.version.number == 2 and live.version.served.overlay.clicks == {}
        assert waiting(tmp_path) == []
        assert click(client, "user-2", "item-2", timestamp=NOON)["known"]
    assert run("update", tmp_path) == 0  # nothing new
    assert len(rows(tmp_path)) == 1802 and open_store(tmp_path / "s").live == 2


def test_the_event_id_of_a_click_is_remembered_after_an_update_and_matches_a_row_without_one(tmp_path: Path) -> None:
    _, day, _ = stored(tmp_path)
    row = day.row(0, named=True)
    with server(tmp_path) as (client, live):
        click(client, "user-1", "item-1", timestamp=row["timestamp"] // 10**6, event_id="e1")
        assert not click(
            client, row["user_id"], row["item_id"], timestamp=row["timestamp"] / 10**6, event_id="e2"
        )["known"]  # fmt: skip
        assert run("update", tmp_path, str(tmp_path / "day-1.parquet"), *ANY) == 0  # its rows have no event_id
        assert len(rows(tmp_path)) == 1800 + 1
        live.refresh()
        assert live.version is not None and live.version.number == 2
        assert click(client, "user-1", "item-1", event_id="e1")[
            "known"
        ]  # sent again, later, as by a client that retries


def test_a_click_may_be_at_most_ten_minutes_in_the_future(tmp_path: Path) -> None:
    stored(tmp_path)
    with server(tmp_path) as (client, _):
        now = time.time()
        assert not click(client, "user-1", "item-1", timestamp=int(now) + 60)["known"]
        answer = client.post(
            "/events", json={"events": [{"user_id": "user-1", "item_id": "item-1", "timestamp": int(now) + 3600}]}
        )
        assert answer.status_code == 422 and "in the future" in answer.json()["detail"]


def test_many_clicks_are_added_fast_and_new_users_get_their_own_rows(tmp_path: Path) -> None:
    stored(tmp_path)
    wrote = ClickJournal(tmp_path / "s")
    wrote.append([Click(f"new-{n // 2}", f"item-{1 + n % 20}", NOON * 10**6 + n) for n in range(4000)])
    wrote.close()
    with server(tmp_path) as (_, live):
        assert live.version is not None
        fresh, n_users = live.version.served.overlay, len(live.version.served.users)
        assert sorted(fresh.new_users.values()) == list(range(n_users + 1, n_users + 2001))
        assert all(len(clicks) == 2 for clicks in fresh.clicks.values())


def test_an_update_may_have_clicks_only_and_they_stay_in_the_lists_if_it_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    with server(tmp_path) as (client, live):
        for n in range(60):  # one user has all of the day: it is odd
            click(client, "user-1", f"item-{n % 5}", timestamp=NOON + n)
        listed = items(client.get("/recommend/user-1"))
        assert run("update", tmp_path) == 8
        live.refresh()
        assert live.version is not None and live.version.number == 1
        assert items(client.get("/recommend/user-1")) == listed
    with server(tmp_path) as (client, live):  # another process
        assert items(client.get("/recommend/user-1")) == listed
    assert run("update", tmp_path, "--again", "2", *ANY) == 0
    with server(tmp_path) as (client, live):
        assert live.version is not None and live.version.number == 3 and live.version.served.overlay.clicks == {}
    assert len(rows(tmp_path)) == 1560


def test_a_crash_between_log_and_journal_duplicates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, day, _ = stored(tmp_path)
    wrote = ClickJournal(tmp_path / "s")
    wrote.append([Click("user-1", "item-1", day["timestamp"][0] + n) for n in range(1, 6)])
    wrote.close()

    def die(files: Any, batch: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "mark_taken", die)
    job = NightlyJob(open_store(tmp_path / "s"))
    with pytest.raises(KeyboardInterrupt):
        nightly.append_with_clicks(job, read_log(day), "day")
    monkeypatch.undo()
    assert len(waiting(tmp_path)) == 5
    nightly.append_with_clicks(NightlyJob(open_store(tmp_path / "s")), read_log(day), "day")
    assert len(rows(tmp_path)) == 1805 and waiting(tmp_path) == []


@pytest.mark.parametrize("dies", [False, True])
def test_clicks_newer_than_a_file_wait_for_the_next_update_and_make_no_row_late(
    dies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the file of the first day comes when half of the second is over
    _, first, second = stored(tmp_path)
    early = second.head(20).select("user_id", "item_id", "timestamp")
    wrote = ClickJournal(tmp_path / "s")
    wrote.append([Click("user-1", "item-1", first["timestamp"][0] + 1), *(Click(*row) for row in early.iter_rows())])
    wrote.close()
    if dies:  # once they lie in a file of their own, before they have left the other one

        def die(path: Path, clicks: Any) -> None:
            written_file(path, clicks)
            path.with_name(".17-4242.closed").write_text("half of a file, with a user's id in it")
            raise KeyboardInterrupt

        written_file = journal._write_file
        monkeypatch.setattr(journal, "_write_file", die)
        with pytest.raises(KeyboardInterrupt):
            nightly.append_with_clicks(NightlyJob(open_store(tmp_path / "s")), read_log(first), "day-1")
        monkeypatch.undo()
        assert len(waiting(tmp_path)) == 41
        with server(tmp_path) as (_, live):  # each once, though they lie in two files
            assert live.version is not None
            folded = live.version.served.overlay.clicks.values()
            assert folded and all(len(set(one)) == len(one) for one in folded)
    assert run("update", tmp_path, str(tmp_path / "day-1.parquet"), *ANY) == 0
    assert len(rows(tmp_path)) == 1500 + 300 + 1
    assert {one.key for one in waiting(tmp_path)} == set(early.iter_rows())
    assert not list((tmp_path / "s" / "clicks").glob(".*"))
    with server(tmp_path) as (client, _):  # they are in the lists meanwhile
        user, item, when = early.row(0)
        assert client.get(f"/users/{user}/interests").json()["n_fresh"] >= 1
        assert click(client, user, item, timestamp=when / 10**6)["known"]
    assert run("update", tmp_path, str(tmp_path / "day-2.parquet"), *ANY) == 0
    assert len(rows(tmp_path)) == 1801 + len(second) and waiting(tmp_path) == []
    day = open_store(tmp_path / "s").manifest(3).data["day"]
    assert day["share_late"] == 0 and day["share_doubled"] == 0


def test_a_click_whose_event_id_is_in_the_file_does_not_wait(tmp_path: Path) -> None:
    _, day, _ = stored(tmp_path)
    wrote = ClickJournal(tmp_path / "s")
    wrote.append([Click("user-1", "item-1", NOON * 10**6, "e1"), Click("user-1", "item-1", NOON * 10**6, "e2")])
    wrote.close()
    ids = [f"e{n}" for n in range(1, 300, 3)] + [None] * (len(day) - 100)
    day.with_columns(event_id=pl.Series(ids)).write_parquet(tmp_path / "night.parquet")
    assert run("update", tmp_path, str(tmp_path / "night.parquet"), *ANY) == 0
    assert len(rows(tmp_path)) == 1800 and [one.event_id for one in waiting(tmp_path)] == ["e2"]


def test_reading_while_files_are_split_misses_no_click(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = ClickJournal(tmp_path)
    for _ in range(2):
        wrote.append([Click("user-1", "item-1", when) for when in (1, 9)])
        wrote.close()
    files = journal.close_journal(tmp_path)
    read = journal._read_clicks

    def meanwhile(path: Path) -> list[Click]:
        monkeypatch.setattr(journal, "_read_clicks", read)
        journal.defer_clicks(files, lambda click: click.time > 5)  # between the list of the files and what is in them
        return read(path)

    monkeypatch.setattr(journal, "_read_clicks", meanwhile)
    assert {one.time for file in journal.read_journal(tmp_path) for one in file.clicks} == {1, 9}


def test_an_incomplete_last_line_was_never_acknowledged_and_earlier_damage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    wrote = ClickJournal(tmp_path / "s")
    wrote.append([Click("a", "b", 1), Click("a", "c", 2)])
    wrote.close()
    [path] = (tmp_path / "s" / "clicks").iterdir()
    whole = path.read_bytes()
    for cut in range(len(whole)):  # killed at any byte
        path.write_bytes(whole[:cut])
        assert waiting(tmp_path) == [Click("a", "b", 1), Click("a", "c", 2)][: whole[:cut].count(b"\n")]
    path.write_bytes(whole.replace(b'"b"', b'"x"'))
    with pytest.raises(StateError, match="Line 1 of .* is damaged"):
        waiting(tmp_path)


def test_writers_and_an_update_that_closes_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    writers = [ClickJournal(tmp_path / "s") for _ in range(2)]
    found: list[Click] = []

    def write(n: int) -> None:
        for i in range(60):
            writers[n].append([Click(f"u{n}", "i", i)])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        closed = journal.close_journal(tmp_path / "s")
        found += [one for file in closed for one in file.clicks]
        journal.mark_taken(closed, None)
    for one_of in writers:
        one_of.close()
    found += [one for file in journal.close_journal(tmp_path / "s") for one in file.clicks]
    assert sorted(found) == sorted(Click(f"u{n}", "i", i) for n in range(2) for i in range(60))


def test_a_full_disk_acknowledges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    with server(tmp_path) as (client, _):
        click(client, "user-1", "item-1", timestamp=NOON)
        before = items(client.get("/recommend/user-1"))

        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        answer = client.post("/events", json={"events": [{"user_id": "user-1", "item_id": before[0]}]})
        monkeypatch.undo()
        assert answer.status_code == 409 and "None was stored" in answer.json()["detail"]
        assert items(client.get("/recommend/user-1")) == before and len(waiting(tmp_path)) == 1
        click(client, "user-1", before[0])
        assert len(waiting(tmp_path)) == 2


def test_an_erased_user_is_unknown_at_once_and_deleted_from_disk(tmp_path: Path) -> None:
    stored(tmp_path, n=2)
    right = {"authorization": f"Bearer {TOKEN}"}
    with server(tmp_path, ServerLimits(TOKEN, max_requests_per_s=0)) as (client, _):
        client.headers.update(right)
        click(client, "user-1", "item-1", timestamp=NOON)
        click(client, "only-here", "item-1", timestamp=NOON)
        click(client, "user-2", "item-1", timestamp=NOON)
        receipt = client.delete("/users/user-1").json()
        assert receipt["clicks"] == 1 and receipt["versions"] == [1, 2] and receipt["events"] > 0
        assert client.delete("/users/only-here").json()["clicks"] == 1
        for user in ("user-1", "only-here"):
            assert client.get(f"/recommend/{user}").json()["fallback"] == "unknown user"
        assert client.get("/users/user-2/interests").json()["n_fresh"] == 1
        assert [one.user_id for one in waiting(tmp_path)] == ["user-2"]
        click(client, "only-here", "item-2", timestamp=NOON + 1)  # comes back as somebody new
        assert client.get("/users/only-here/interests").json()["n_events"] == 1


def test_the_server_erases_in_a_separate_process(tmp_path: Path) -> None:
    stored(tmp_path)
    assert erase_in_subprocess(tmp_path / "s", "user-1")["versions"] == [1]
    with pytest.raises(StateError, match="no store"):
        erase_in_subprocess(tmp_path / "none", "user-1")


def test_a_log_without_timestamps_takes_clicks_in_their_order(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 2, 2, 3], "item_id": [5, 6, 5, 7, 6], "period": [0] * 5, "order": range(5)})
    frame.write_parquet(tmp_path / "log.parquet")
    assert run("fit", tmp_path, str(tmp_path / "log.parquet"), "--model", "item-knn") == 0
    with server(tmp_path) as (client, live):
        found = client.post("/events", json={"events": [{"user_id": 9, "item_id": i} for i in (5, 6)]}).json()
        assert all(one["folded"] and one["event_id"] for one in found["events"])
        assert items(client.get("/recommend/9?k=1")) == [7]
        assert client.post("/events", json={"events": [{"user_id": "x", "item_id": 5}]}).status_code == 422
    assert run("update", tmp_path, *ANY) == 0
    assert rows(tmp_path).select("user_id", "item_id").rows()[-2:] == [(9, 5), (9, 6)]


def test_a_number_is_its_text_in_a_log_of_text_as_in_files(tmp_path: Path) -> None:
    base = stored(tmp_path)[0]
    with server(tmp_path) as (client, _):
        for user in (12, "12"):
            click(client, user, base["item_id"][0], timestamp=NOON)  # type: ignore[arg-type]
        assert client.post("/recommend", json={"users": [12], "k": 2}).json()["lists"][0]["fallback"] is None
        assert client.get("/recommend/" + "%C3%A9" * 500).json()["fallback"] == "unknown user"  # 1,000 bytes
    assert [(one.user_id, one.time) for one in waiting(tmp_path)] == [("12", NOON * 10**6)]  # one click
    numbers = pl.DataFrame({"user_id": [12, 13], "item_id": base["item_id"][:2], "timestamp": [NOON, NOON]})
    numbers.write_parquet(tmp_path / "new.parquet")
    assert run("update", tmp_path, str(tmp_path / "new.parquet"), *ANY) == 0
    assert rows(tmp_path)["user_id"].to_list()[-2:] == ["12", "13"]  # the click and the row of the file are one event
