"""One event counts once, whatever way its copies take: files, clicks, replay, Python; with or without ids.

A row is named by its event id: "-" has no such column, "null" has no value. A and B are two ids.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime
from itertools import permutations, product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from serving import ANY, click, run, server, stored
from starlette.testclient import TestClient

from freshrec import Recommender
from freshrec.data.duplicates import EventIndex, count_duplicates, count_reused_ids, drop_duplicates
from freshrec.data.log import read_log
from freshrec.nightly.click_intake import merge_clicks
from freshrec.replay.recipe_schema import parse_recipe
from freshrec.replay.recipes import load_log
from freshrec.server.live_version import LiveVersion
from freshrec.store import click_journal as journal
from freshrec.store.click_journal import Click, clicks_to_frame
from freshrec.store.event_log import EventLog

KINDS = ("-", "null", "A", "B")
PAIRS = list(product(KINDS, KINDS))
MOMENT = 1_700_000_000  # seconds


def n_events(pair: tuple[str, ...]) -> int:
    """The number of events of two rows with the same user, item and time: only two different ids make two."""
    return 2 if set(pair) == {"A", "B"} else 1


def frame(*kinds: str, moments: tuple[int, ...] = ()) -> pl.DataFrame:
    """A row of user 1 and item 5 for each kind, at MOMENT by default."""
    times = moments or (MOMENT,) * len(kinds)
    rows = pl.DataFrame({"user_id": [1] * len(kinds), "item_id": [5] * len(kinds), "timestamp": times})
    return rows if set(kinds) == {"-"} else rows.with_columns(event_id=pl.Series(map(id_of, kinds), dtype=pl.String))


def id_of(kind: str) -> str | None:
    return kind if kind in ("A", "B") else None


def rows_of(folder: Path) -> pl.DataFrame:
    return EventLog(folder / "s" / "log").read()


@pytest.mark.parametrize("pair", PAIRS)
def test_one_file_holds_two_events_only_if_two_ids_differ(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = pl.concat([frame(kind) for kind in pair], how="diagonal")
    log = read_log(rows)
    assert len(drop_duplicates(log).frame) == len(rows) - count_duplicates(log) == n_events(pair)
    rows.write_parquet(tmp_path / "log.parquet")
    assert len(load_log(parse_recipe({"log": {"path": str(tmp_path / "log.parquet")}})).frame) == n_events(pair)
    assert len(Recommender("repeat-last").fit(rows).served.counts.histories.items_R) == n_events(pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_two_files_hold_two_events_only_if_two_ids_differ(pair: tuple[str, str], tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for n, kind in enumerate(pair):
        log.append(read_log(frame(kind)).frame, f"s{n}", True)
    assert len(log.read()) == log.batches()["rows"].sum() == n_events(pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_refused_batch_and_its_correction_hold_two_events_only_if_two_ids_differ(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    log = EventLog(tmp_path)
    log.append(read_log(frame(pair[0])).frame, "refused", True)
    # no live version has learned the first batch, so the correction is appended as a whole
    assert log.append(read_log(frame(pair[1])).frame, "corrected", True, ignored_batches=[1]).n_appended == 1
    assert len(log.read()) == len(log.read([1, 2])) == n_events(pair)
    assert len(log.rows_not_in(log.read([1]), [2])) == n_events(pair) - 1


def test_a_file_with_the_rows_of_yesterday_adds_only_new_ones_with_or_without_ids(tmp_path: Path) -> None:
    log, moments = EventLog(tmp_path), (MOMENT, MOMENT + 1, MOMENT + 2)
    yesterday = frame("A", "null", "B", moments=moments)
    log.append(read_log(yesterday).frame, "s1", True)
    for n, rows in enumerate((yesterday, yesterday.drop("event_id"), yesterday.with_columns(event_id=pl.lit(None)))):
        today = pl.concat([rows, frame("-", moments=(MOMENT + 3 + n,))], how="diagonal")
        assert log.append(read_log(today).frame, f"other name {n}", True).n_appended == 1
    assert len(log.read()) == 6


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[1] != "-"])
def test_a_file_and_a_click_hold_two_events_only_if_two_ids_differ(pair: tuple[str, str]) -> None:
    clicks = clicks_to_frame([Click(1, 5, MOMENT * 10**6, id_of(pair[1]))])
    merged = merge_clicks(read_log(frame(pair[0])), clicks).frame
    assert len(merged) == n_events(pair)
    # the id of a click is never lost, because the click may be sent again
    assert pair[1] == "null" or pair[1] in merged["event_id"].to_list()


@pytest.mark.parametrize("pair", PAIRS)
def test_the_python_api_does_not_learn_the_newest_moment_twice(pair: tuple[str, str]) -> None:
    fitted, other_id = Recommender("repeat-last").fit(frame(pair[0])), {"A": "B", "B": "A"}.get(pair[1], pair[1])
    fitted.update(frame(pair[1], other_id, moments=(MOMENT, MOMENT + 1)))
    # a version keeps no ids, so a learned row is one without id: the key decides
    assert fitted.served.counts.histories.times_R.tolist() == [MOMENT * 10**6, (MOMENT + 1) * 10**6]
    state = fitted.served.state
    assert fitted.update(frame("-", moments=(MOMENT + 1,))).served.state is state  # nothing is new


@pytest.mark.parametrize("order", list(permutations(["A", "B", "null"])))
def test_a_row_without_id_stands_for_every_event_of_its_key(order: tuple[str, ...], tmp_path: Path) -> None:
    assert drop_duplicates(read_log(frame(*order))).frame["event_id"].sort().to_list() == ["A", "B"]
    # what is known first decides: after a row without id, A and B are known, too
    known, log = EventIndex(), EventLog(tmp_path)
    events = list[str]()
    for n, kind in enumerate(order):
        event = id_of(kind), (1, 5, MOMENT)
        if not known.holds(*event):
            known.add(*event)
            events.append(kind)
        log.append(read_log(frame(kind)).frame, f"s{n}", True)
    assert events == (["null"] if order[0] == "null" else [kind for kind in order if kind != "null"])
    stored_ids = log.read().with_columns(event_id=pl.col("event_id") if events != ["null"] else pl.lit("null"))
    assert stored_ids["event_id"].to_list() == events


def test_without_timestamps_only_ids_decide(tmp_path: Path) -> None:
    rows = pl.DataFrame({"user_id": [1] * 4, "item_id": [5] * 4, "period": [0] * 4, "event_id": ["A", "A", None, None]})
    assert len(drop_duplicates(read_log(rows)).frame) == 3
    log, known = EventLog(tmp_path), EventIndex()
    found = [log.append(read_log(rows).frame, source, False).n_appended for source in ("s1", "s2")]
    assert found == [3, 2]  # A is known; rows without id are always new
    known.add("A", None)
    assert [known.holds("A", None), known.holds("B", None), known.holds(None, None)] == [True, False, False]


def test_with_exposures_the_label_belongs_to_the_key() -> None:
    rows = frame("null", "A", "null", "null").with_columns(label=pl.Series([0.0, 1.0, 1.0, None]))
    # the third row is a copy of A; the exposure and the row without label are not
    assert drop_duplicates(read_log(rows)).frame.select("label", "event_id").rows() == [
        (0.0, None),
        (1.0, "A"),
        (None, None),
    ]


def test_the_first_row_of_a_reused_id_counts_and_a_note_says_so() -> None:
    rows = frame("A", "A", "B", "B", moments=(MOMENT, MOMENT + 9, MOMENT + 1, MOMENT + 1))
    log = drop_duplicates(read_log(rows))
    assert log.frame.select("event_id", pl.col("time") // 10**6).rows() == [("A", MOMENT), ("B", MOMENT + 1)]
    assert count_reused_ids(read_log(rows).frame, True) == 1
    assert log.notes[-1].startswith("1 event_id stands for rows with another user, item or time.")


def test_an_update_says_that_a_source_counts_its_ids_from_1_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *_ = stored(tmp_path, "repeat-last")
    for n, moment in enumerate((after(base), after(base) + 86_400)):
        rows = [("kim", "item-1", moment + i, f"{i}") for i in range(3)]
        day([*rows, *rows[:1]]).write_parquet(tmp_path / f"day-{n}.parquet")
        assert run("update", tmp_path, str(tmp_path / f"day-{n}.parquet"), *ANY) == 0
    # the second day is lost, as its three ids are those of the first
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("stand for rows with another user") == 1
    assert "day-1.parquet: 3 event_ids stand for rows with another user, item or time. Only the first row" in shown


def ask(client: TestClient, user: str, kind: str, moment: int) -> bool:
    """Send a click on item-1. Returns whether it is known. The id is different for each user."""
    more = {"event_id": f"{kind} of {user}"} if kind in ("A", "B") else {}
    return bool(click(client, user, "item-1", timestamp=moment, **more)["known"])


def after(base: pl.DataFrame) -> int:
    """A moment after the base log, in seconds."""
    return int(base["timestamp"].cast(pl.Int64).to_numpy().max()) // 10**6 + 60


def day(rows: list[tuple[str, str, int, str | None]]) -> pl.DataFrame:
    """Rows of a file: user, item, seconds, event_id."""
    names = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "event_id": pl.String}
    return pl.DataFrame(rows, names, orient="row")


def test_clicks_meet_learned_rows_clicks_and_later_files_by_the_same_table(tmp_path: Path) -> None:
    # Each pair has a user of its own. A learned row of kind "-" comes from a file without ids.
    base, *_ = stored(tmp_path, "repeat-last")
    moment, file = after(base), tmp_path / "night.parquet"
    pairs = [pair for pair in PAIRS if pair[1] != "-"]
    users = {pair: f"{pair[0]} then {pair[1]}" for pair in pairs}
    expected = {pair: n_events(pair) == 1 for pair in pairs}

    named = [
        (user, "item-1", moment, f"{kind} of {user}" if id_of(kind) else None)
        for (kind, _), user in users.items()
        if kind != "-"
    ]
    day(named).write_parquet(file)
    assert run("update", tmp_path, str(file), *ANY) == 0
    plain = [(user, "item-1", moment, None) for (kind, _), user in users.items() if kind == "-"]
    day(plain).drop("event_id").write_parquet(file)
    assert run("update", tmp_path, str(file), *ANY) == 0
    n_learned = len(rows_of(tmp_path))

    for known in (expected, dict.fromkeys(pairs, True)):  # the second time in another server
        with server(tmp_path) as (client, live):
            assert {pair: ask(client, user, pair[1], moment) for pair, user in users.items()} == known
            # known clicks are not stored
            assert [one.event_id for one in waiting(live)] == ["B of A then B", "A of B then A"]
            # the same ids again, by a client that retries later
            assert all(ask(client, user, pair[1], moment + 7) for pair, user in users.items() if id_of(pair[1]))
    # learned after that, and known to another server
    assert run("update", tmp_path, *ANY) == 0
    assert len(rows_of(tmp_path)) == n_learned + 2
    with server(tmp_path) as (client, live):
        assert all(ask(client, user, pair[1], moment + 9) for pair, user in users.items() if id_of(pair[1]))
        assert all(ask(client, user, pair[1], moment) for pair, user in users.items())
        assert waiting(live) == []


def waiting(live: LiveVersion) -> list[Click]:
    return [one for file in journal.read_journal(live.store.folder) for one in file.clicks]


def test_a_click_then_a_click_or_a_file_by_the_same_table(tmp_path: Path) -> None:
    base, *_ = stored(tmp_path, "repeat-last")
    moment, file = after(base), tmp_path / "night.parquet"
    pairs = [pair for pair in PAIRS if pair[0] != "-"]
    with_click = {pair: f"{pair[0]} then click {pair[1]}" for pair in pairs if pair[1] != "-"}
    with_file = {pair: f"{pair[0]} then {pair[1]}" for pair in pairs}
    with server(tmp_path) as (client, _):
        for users in (with_click, with_file):
            assert not any(ask(client, user, pair[0], moment) for pair, user in users.items())
        assert {pair: ask(client, user, pair[1], moment) for pair, user in with_click.items()} == {
            pair: n_events(pair) == 1 for pair in with_click
        }
    with server(tmp_path) as (client, live):
        # dropped ids are known after a restart
        assert all(ask(client, user, kind, moment + 3) for (_, kind), user in with_click.items() if id_of(kind))
        events = sum(map(n_events, with_click))
        assert len(waiting(live)) == events + len(with_file)
        rows = [
            (user, "item-1", moment, f"{kind} of {user}" if id_of(kind) else None)
            for (_, kind), user in with_file.items()
        ]
        day(rows).write_csv(file.with_suffix(".csv"))
        assert run("update", tmp_path, str(file.with_suffix(".csv")), *ANY) == 0
        log = rows_of(tmp_path).filter(pl.col("time") == moment * 10**6)
        counted = Counter(log["user_id"])
        assert counted == {
            **{user: n_events(pair) for pair, user in with_click.items()},
            **{user: n_events(pair) for pair, user in with_file.items()},
        }
        live.refresh()
        assert all(ask(client, user, pair[0], moment) for pair, user in (with_click | with_file).items())
    with server(tmp_path) as (client, _):  # an id of a click stays known when the file's row has none
        assert all(ask(client, user, pair[0], moment + 5) for pair, user in with_file.items() if id_of(pair[0]))


def test_an_id_that_the_log_does_not_take_is_remembered_until_its_user_is_erased(tmp_path: Path) -> None:
    base, *_ = stored(tmp_path, "repeat-last")
    moment, file = after(base), tmp_path / "night.parquet"
    with server(tmp_path) as (client, live):
        assert not ask(client, "kim", "A", moment)  # before the server knows the file
        # another delivery has brought the row without an id meanwhile, in a batch that no version has learned yet
        EventLog(tmp_path / "s" / "log").append(read_log(day([("kim", "item-1", moment, None)])).frame, "s", True)
        day([("zoe", "item-1", moment, None)]).write_parquet(file)
        assert run("update", tmp_path, str(file), *ANY) == 0
        assert len(rows_of(tmp_path).filter(pl.col("user_id") == "kim")) == 1
    with server(tmp_path) as (client, live):
        assert ask(client, "kim", "A", moment + 5)
        assert [one.user_id for one in journal.read_known_clicks(live.store.folder)] == ["kim"]
        assert ask(client, "zoe", "B", moment)
    assert run("erase", tmp_path, "kim") == 0
    assert [one.user_id for one in journal.read_known_clicks(tmp_path / "s")] == ["zoe"]
    with server(tmp_path) as (client, live):
        assert not ask(client, "kim", "A", moment + 5)  # somebody new
        assert ask(client, "zoe", "B", moment + 5)


def test_known_clicks_are_trimmed_and_none_is_lost_to_a_server_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_KNOWN_CLICKS", 3)
    writer = journal.ClickJournal(tmp_path, journal.KNOWN_SUFFIX)
    tmp_path.joinpath("clicks").mkdir()
    writer.append([Click("a", "b", n, f"e{n}") for n in range(5)])
    journal.remove_learned_files(tmp_path, 0)
    writer.append([Click("a", "b", 5, "e5")])
    assert [one.event_id for one in journal.read_known_clicks(tmp_path)] == ["e2", "e3", "e4", "e5"]
    assert journal.read_journal(tmp_path) == [] and journal.close_journal(tmp_path) == []
    writer.close()


def test_a_damaged_log_stops_no_server(tmp_path: Path) -> None:
    base, *_ = stored(tmp_path, "repeat-last")
    row = base.row(-1, named=True)
    day([("kim", "item-1", after(base), "A")]).write_parquet(tmp_path / "night.parquet")
    assert run("update", tmp_path, str(tmp_path / "night.parquet"), *ANY) == 0
    next((tmp_path / "s" / "log" / "batch=2").iterdir()).write_bytes(b"damage")
    with server(tmp_path) as (client, live):
        assert any("event ids of the log cannot be read" in line for line in live.said)  # type: ignore[attr-defined]
        assert click(client, row["user_id"], row["item_id"], timestamp=row["timestamp"] / 10**6)["known"]


N_WORLDS, N_ROUNDS = 200, 5
ITEMS = [f"item-{n}" for n in range(1, 6)]


def interleaving(world: int, start: int) -> list[list[tuple[bool, str, str, int, str | None]]]:
    """The copies of a world's events by round: whether the copy is a click, user, item, seconds and event_id.

    A world is a user with 1 to 3 events. Each event has 1 to 4 copies, and each copy takes its way in a random round.
    A copy may lose its id on the way. Events of one key keep their ids: without, nobody could tell whose copy it is.
    """
    source = random.Random(world)
    rounds: list[list[tuple[bool, str, str, int, str | None]]] = [[] for _ in range(N_ROUNDS)]
    share_key = source.random() < 0.3
    for event in range(source.randint(2, 3) if share_key else source.randint(1, 3)):
        item, seconds = (ITEMS[0], start + world) if share_key else (ITEMS[event], start + world + 1000 * event)
        for _ in range(source.randint(1, 4)):
            event_id = f"{world}-{event}" if share_key or source.random() < 0.6 else None
            copy = source.random() < 0.5, f"world-{world}", item, seconds, event_id
            rounds[source.randrange(N_ROUNDS)].append(copy)
    return rounds


def test_200_random_interleavings_of_clicks_and_files_count_each_event_once(tmp_path: Path) -> None:
    # All worlds go through the same nights, but none of their users or ids meet.
    base, *_ = stored(tmp_path, "repeat-last")
    worlds, order = [interleaving(world, after(base)) for world in range(N_WORLDS)], random.Random(0)
    seen: dict[str, set[Any]] = {f"world-{world}": set() for world in range(N_WORLDS)}
    shared = {copy[1] for rounds in worlds for copies in rounds for copy in copies if is_shared(rounds)}
    for night in range(N_ROUNDS):
        copies = [copy for rounds in worlds for copy in rounds[night]]
        order.shuffle(copies)
        with server(tmp_path) as (client, live):  # each night in a server that has just started
            send(client, [copy[1:] for copy in copies if copy[0]], order)
            for is_click, user, item, seconds, event_id in copies:
                if is_click:
                    seen[user].add(event_id if user in shared else (item, seconds))
            assert shown(live) == {user: len(events) for user, events in seen.items() if events}
            rows = day([copy[1:] for copy in copies if not copy[0]])
            unit = order.choice([1, 1000, 10**6])
            rows.with_columns(pl.col("timestamp") * unit).write_parquet(tmp_path / f"night-{night}.parquet")
            assert run("update", tmp_path, str(tmp_path / f"night-{night}.parquet"), *ANY) == 0
            for is_click, user, item, seconds, event_id in copies:
                if not is_click:
                    seen[user].add(event_id if user in shared else (item, seconds))
            live.refresh()
            assert shown(live) == {user: len(events) for user, events in seen.items() if events}
    assert run("update", tmp_path) in (0, 8)  # clicks that are newer than the last file
    counted = Counter(user for user in rows_of(tmp_path)["user_id"] if user.startswith("world"))
    assert counted == {user: len(events) for user, events in seen.items() if events}


def is_shared(rounds: list[list[tuple[bool, str, str, int, str | None]]]) -> bool:
    """Whether several events of a world have the same key: each id counts."""
    copies = [copy for copies in rounds for copy in copies]
    return (
        len({copy[4] for copy in copies}) > 1
        and len({copy[2:4] for copy in copies}) == 1
        and None not in {copy[4] for copy in copies}
    )


def send(client: TestClient, rows: list[tuple[str, str, int, str | None]], order: random.Random) -> None:
    """Send clicks with times in s, ms or ISO 8601."""
    forms: list[Any] = [int, lambda s: s * 1000, lambda s: datetime.fromtimestamp(s, UTC).isoformat()]
    names = ("user_id", "item_id", "timestamp", "event_id")
    events = [dict(zip(names, (user, item, order.choice(forms)(when), id))) for user, item, when, id in rows]
    if events:
        assert client.post("/events", json={"events": events}).status_code == 200


def shown(live: LiveVersion) -> dict[str, int]:
    """The number of events of each world's user that lists use: learned ones and those of the overlay."""
    assert live.version is not None
    served = live.version.served
    overlay, histories, found = served.overlay, served.counts.histories, dict[str, int]()
    for world in range(N_WORLDS):
        user = f"world-{world}"
        row = served.users.row(user)
        learned = int(histories.offsets_U[row + 1] - histories.offsets_U[row]) if row else 0
        found[user] = learned + len(overlay.clicks.get(row or overlay.new_users.get(user, -1), ()))
    return {user: n for user, n in found.items() if n}
