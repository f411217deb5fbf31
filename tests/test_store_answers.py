"""What `freshrec history`, `status` and `diff` print for people: short lines, labels, no contradictions."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_nightly import days, learn, new_job

from freshrec.cli.app import main
from freshrec.cli.history_text import VersionState, short_form, short_reason, state_reason, version_states
from freshrec.data.log import read_log
from freshrec.nightly.delivery_stats import DeliveryStats
from freshrec.nightly.gate import HoldoutValues, find_anomalies, judge_challenger
from freshrec.nightly.inspection import store_status
from freshrec.nightly.job import NightlyJob
from freshrec.store.click_journal import Click, ClickJournal
from freshrec.store.collection import collect_garbage
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, create_store, open_store

REASON = "83.3 % of the rows come from one user; on 28 earlier days it was at most 19.8 %. More than 25 % is unusual."


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints; it must succeed, and print nothing on stderr."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def write(store: Store, number: int, parent: int, promoted: bool = True, goes_live: bool | None = None) -> None:
    """Write a version without a model; its manifest is complete."""
    update = Manifest(
        id=number,
        parent=parent or None,
        kind="update" if parent else "fit",
        made_at=f"2025-06-{number:02d}T04:15:09+00:00",
        recipe={"model": "blend", "strategy": "refit"},
        spans_seen=number,
        sizes={"events": 1_000_000 + number, "users": 2000, "items": 300},
        numbers={"new_events": 1234.0, "new_users": 5.0, "ndcg@20": 0.19944, "ndcg@20 live": 0.2, "forgetting": 0.01}
        if parent
        else {"ndcg@20": 0.15, "ndcg@20 popularity": 0.02, "wait_s": 3.14},
        promoted=promoted,
        goes_live=promoted if goes_live is None else goes_live,
        reasons=[] if promoted else [REASON],
        notes=["Only 20 users have earlier events."],
    )
    store.write_version(update, lambda folder: (folder / "a").write_text(str(number)))


@pytest.fixture
def shop(tmp_path: Path) -> Store:
    """1 and 2 were live, 3 was refused, 4 rolled back, 5 is live by force, 6 waits, and the files of 1 are deleted."""
    with create_store(tmp_path / "shop") as store:
        write(store, 1, 0)
        store.move_pointer(1, "fit")
        for number, parent, promoted in ((2, 1, True), (3, 2, False), (4, 2, True), (5, 2, False), (6, 5, True)):
            write(store, number, parent, promoted, goes_live=number != 3)
        store.move_pointer(2, "update")
        store.move_pointer(4, "update")
        store.move_pointer(2, "rollback", "bad import")
        store.move_pointer(5, "update", "sale day")
    (tmp_path / "shop" / "versions" / "1" / "collected").touch()
    return open_store(tmp_path / "shop")


def test_history_knows_what_became_of_each_version(shop: Store) -> None:
    states = version_states(shop)
    assert {number: found.state for number, found in states.items()} == {
        1: "was live",
        2: "was live",
        3: "refused",
        4: "rolled back",
        5: "live",
        6: "waiting",
    }
    assert [number for number, found in states.items() if found.is_deleted] == [1]
    assert states[4].reason == "bad import" and states[5].reason == "by force: sale day" and states[3].reason == REASON


def test_every_version_that_a_rollback_dropped_has_its_reason(tmp_path: Path) -> None:
    with create_store(tmp_path / "shop") as store:
        for number in range(1, 8):
            write(store, number, number - 1)
            store.move_pointer(number, "update" if number > 1 else "fit")
        store.move_pointer(3, "rollback", "too bad")
        write(store, 8, 3, promoted=False, goes_live=True)
        store.move_pointer(8, "update", "reasonA")
        states = version_states(store)
    assert {n: (states[n].state, states[n].reason) for n in range(4, 8)} == dict.fromkeys(
        range(4, 8), ("rolled back", "too bad")
    )
    assert states[8].reason == "by force: reasonA" and states[3].reason == ""


def test_a_version_that_was_dropped_twice_has_the_reason_of_the_last_time(tmp_path: Path) -> None:
    with create_store(tmp_path / "shop") as store:
        for number in (1, 2, 3):
            write(store, number, number - 1)
        for number, action, reason in (
            (1, "fit", ""), (2, "update", ""), (3, "update", ""), (1, "rollback", "first"), (3, "promote", "good"),
            (1, "rollback", "second"),
        ):  # fmt: skip
            store.move_pointer(number, action, reason)  # type: ignore[arg-type]
        states = version_states(store)
    assert [states[n].reason for n in (1, 2, 3)] == ["", "second", "second"]


def test_a_rollback_to_a_forced_version_keeps_the_reason_of_the_force(tmp_path: Path) -> None:
    with create_store(tmp_path / "shop") as store:
        for number in (1, 2, 3):
            write(store, number, number - 1, promoted=number != 2, goes_live=True)
        store.move_pointer(1, "fit")
        store.move_pointer(2, "update", "checked")
        store.move_pointer(3, "update")
        store.move_pointer(2, "rollback", "version 3 is bad")
        states = version_states(store)
    assert states[2] == VersionState("live", reason="by force: checked")
    assert states[3] == VersionState("rolled back", reason="version 3 is bad")


def test_history_has_one_line_a_version_that_fits_100_columns(shop: Store, capsys: pytest.CaptureFixture[str]) -> None:
    lines = answer(capsys, "history", "--store", str(shop.folder)).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == 2 + 6 + 2  # two lines of heads, two of explanation
    assert lines[2].split() == ["1", "2025-06-01", "04:15", "was", "live*", "1,000,001", "2,000", "0.1500"]
    assert lines[3].split() == ["2", "2025-06-02", "04:15", "was", "live", "1,234", "5", "0.1994", "0.2000"]
    assert lines[4].startswith("  3  2025-06-03 04:15  refused") and "83.3 % of the rows" in lines[4]
    assert lines[5].endswith("bad import") and lines[6].endswith("by force: sale day")
    assert "0 to 1, higher is better" in lines[-2] and lines[-1].startswith("* The files of this version were deleted")


def test_history_shows_the_last_versions_or_the_refused_ones(shop: Store, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--store", str(shop.folder))

    def numbers(*options: str) -> list[int]:
        lines = answer(capsys, "history", *at, *options).splitlines()
        return [int(line.split()[0]) for line in lines if re.match(r" *\d+  2025", line)]

    assert numbers("--last", "2") == [5, 6]
    assert numbers("--refused") == [3, 5]
    assert numbers("--refused", "--last", "1") == [5]
    found = json.loads(answer(capsys, "history", *at, "--last", "2", "--json"))
    assert [version["id"] for version in found["versions"]] == [5, 6] and [move["to"] for move in found["moves"]] == [5]
    found = json.loads(answer(capsys, "history", *at, "--json"))
    assert len(found["versions"]) == 6 and [move["to"] for move in found["moves"]] == [1, 2, 4, 2, 5]


def test_long_history_has_every_number_with_its_label_the_full_reasons_and_the_moves(
    shop: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answer(capsys, "history", "--store", str(shop.folder), "--long").splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    assert f"refused: {REASON}" in text and "note: Only 20 users have earlier events." in text
    assert "forgetting +0.0100 on older events, positive = lost" in text
    assert "Version 1: was live (its events are part of the live version); its files were deleted" in text
    assert "2025-06-02 04:15 UTC, updated from version 1" in text
    assert [line.split()[2:] for line in lines[-2:]] == [
        ["rollback", "version", "2", "bad", "import"],
        ["update", "version", "5", "sale", "day"],
    ]


def test_a_damaged_version_is_named_in_the_history(shop: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (shop.folder / "versions" / "3" / "manifest.json").write_text("{")
    text = answer(capsys, "history", "--store", str(shop.folder))
    assert f"Version 3 is damaged: its manifest cannot be read. See `freshrec doctor --store {shop.folder}`." in text


@pytest.mark.parametrize(
    ("reason", "width", "expected"),
    [
        (REASON, 60, "83.3 % of the rows come from one user"),  # up to the semicolon
        (REASON, 31, "83.3 % of the rows ... one user"),  # without words in the middle
        ("Training diverged: the loss is nan.", 40, "Training diverged"),
        ("by force: sale day; all is well", 40, "by force: sale day; all is well"),
        ("", 40, ""),
    ],
)
def test_a_reason_is_cut_to_its_first_clause(reason: str, width: int, expected: str) -> None:
    assert short_reason(reason, width) == expected


ORDINARY = DeliveryStats(
    n_rows=1000, n_users=100, n_items=80, rows_per_user=10.0, share_unknown_users=0.1, share_unknown_items=0.1,
    share_top_user=0.05, share_top_item=0.1, share_doubled=0.0, share_known=0.0, share_head=0.5, share_late=0.0,
    share_same_second=0.02, whole_days=False, span_hours=23.0, gap_hours=12.0, hole_hours=2.0,
)  # fmt: skip
ANOMALIES = [
    ({"share_late": 1.0, "gap_hours": -8.0}, "100 % late rows"),
    ({"hole_hours": 8784.0}, "8,784 h without rows"),
    ({"share_top_user": 0.714}, "71.4 % of the rows: one user"),
    ({"share_top_item": 0.9}, "90 % of the rows: one item"),
    ({"share_unknown_items": 1.0}, "100 % of the rows: unknown items"),
    ({"share_unknown_users": 1.0}, "100 % of the rows: unknown users"),
    ({"share_head": 0.1}, "10 % of the rows: popular items"),
    ({"share_same_second": 0.8}, "80 % of the users: same second"),
    ({"share_doubled": 0.5}, "50 % duplicates"),
    ({"span_hours": 4.18}, "only 4.18 h covered"),
    ({"n_rows": 401}, "only 401 rows"),
    ({"n_rows": 9000}, "9,000 rows, too many"),
    ({"n_rows": 0}, "no new rows"),
]


@pytest.mark.parametrize(("changes", "short"), ANOMALIES)
def test_every_anomaly_has_a_short_form_that_fits_the_history(changes: dict[str, float], short: str) -> None:
    (reason,) = find_anomalies(replace(ORDINARY, **changes), [ORDINARY] * 8)  # type: ignore[arg-type]
    assert short_form(reason) == short and len(short) <= 33


def test_the_usual_share_of_earlier_deliveries_is_plain_if_it_was_zero() -> None:
    late = replace(ORDINARY, share_late=0.9, gap_hours=-8.0)
    (reason,) = find_anomalies(late, [ORDINARY] * 3)
    assert reason == (
        "90 % of the rows are older than the newest known event (the median row by 8 hours). "
        "In the previous 3 deliveries it was 0 %. More than 50 % is unusual. Learn the files oldest first."
    )
    # Of 14 deliveries one was different. It does not count, because it may be an outlier.
    (reason,) = find_anomalies(late, [ORDINARY] * 13 + [replace(ORDINARY, share_late=0.2)])
    assert "In the previous 14 deliveries it was usually 0 %. More than 25 % is unusual." in reason
    (reason,) = find_anomalies(late, [replace(ORDINARY, share_late=0.2)] * 3)
    assert "In the previous 3 deliveries it was usually at most 20 %. More than 50 % is unusual." in reason


def test_reasons_of_quality_have_short_forms_with_metric_and_change() -> None:
    # All 100 users fall from 0.5 to 0.25, a change of -50 %; the floor is half of 0.9, and 0.25 is below it.
    half, quarter, none = np.full(100, 0.5), np.full(100, 0.25), np.zeros(0)
    days_before = [ORDINARY] * 8
    newest = judge_challenger(ORDINARY, days_before, HoldoutValues(quarter, half, none, none))
    older = judge_challenger(ORDINARY, days_before, HoldoutValues(half, half, quarter, half))
    floor = judge_challenger(ORDINARY, days_before, HoldoutValues(quarter, quarter, none, none, [0.9] * 5))
    assert [short_form(reason) for verdict in (newest, older, floor) for reason in verdict.reasons] == [
        "newest events: ndcg@20 -50 %",
        "forgot: ndcg@20 -50 %",
        "below the floor: ndcg@20 0.2500",
    ]


def test_the_history_shows_as_many_short_reasons_as_fit(shop: Store) -> None:
    anomalies = [find_anomalies(replace(ORDINARY, **ANOMALIES[n][0]), [ORDINARY] * 8)[0] for n in (0, 1)]  # type: ignore[arg-type]
    refused = shop.manifest(3).model_copy(update={"reasons": anomalies})
    state = VersionState("refused", reason=" ".join(anomalies))
    assert state_reason(refused, state, 40) == "100 % late rows; 8,784 h without rows"
    assert state_reason(refused, state, 30) == "100 % late rows"
    retry = refused.model_copy(update={"data": {"retry_of": 2}})
    assert state_reason(retry, state, 30) == "retry of 2; 100 % late rows"


@pytest.fixture
def job(tmp_path: Path) -> NightlyJob:
    """A store of item-knn with three versions, the last one refused, and a click that waits."""
    base, one, two, *_ = days()
    job = new_job(tmp_path / "shop", base, "item-knn")
    learn(job, one, "one")
    job.append_delivery(read_log(two), "two")
    write(job.store, 3, 2, promoted=False)
    journal = ClickJournal(job.store.folder)
    journal.append([Click(1, 2, 10**15)])
    journal.close()
    return job


def test_status_counts_the_whole_store(job: NightlyJob, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "status", "--store", str(job.store.folder), "--json"))
    paths = [path for path in job.store.folder.rglob("*") if path.is_file()]
    sizes = {path.stat().st_ino: path.stat().st_size for path in paths}  # versions share files by hard links
    assert found["total_bytes"] == sum(sizes.values())
    assert found["bytes"] <= found["versions_bytes"] < found["total_bytes"] and found["log_bytes"] > 0
    assert found["versions_bytes"] + found["log_bytes"] <= found["total_bytes"]
    assert (found["versions"], found["log_events"]) == (3, 2100)  # 1,500 and two days of 300
    assert (found["batches_waiting"], found["clicks_waiting"], found["refused"]) == ([3], 1, [3])


def test_status_counts_forced_versions_that_were_rolled_back_as_such_not_as_refused(job: NightlyJob) -> None:
    write(job.store, 4, 2, promoted=False, goes_live=True)  # live by --force, then rolled back
    job.store.move_pointer(4, "update", "sale day")
    write(job.store, 5, 4, promoted=False)  # refused, made live by `promote`, then rolled back
    job.store.move_pointer(5, "promote", "checked")
    job.store.move_pointer(2, "rollback", "bad")
    found = store_status(job.store)
    assert (found["live"], found["refused"], found["refused_not_learned"]) == (2, [3], [3])
    assert [version_states(job.store)[n].state for n in (3, 4, 5)] == ["refused", "rolled back", "rolled back"]


def test_status_has_sections_with_labels_and_no_raw_keys(job: NightlyJob, capsys: pytest.CaptureFixture[str]) -> None:
    text = answer(capsys, "status", "--store", str(job.store.folder))
    lines = text.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == [
        "Live version",
        "Store",
        "Waiting",
        "Quality of the live version, measured when it was made",
        "Time of its update",
        "Notes",
    ]
    assert max(map(len, lines)) <= 100 and not re.search(r"\w_\w", text)
    rows = {line[2:].partition("  ")[0]: line for line in lines if line.startswith("  ")}
    assert "the next update learns them" in rows["held-out events"] and rows["held-out events"].split()[2] == "60"
    assert "only with `update --full-every auto`" in rows["updates until the next one"]
    assert rows["deliveries"].split()[1] == "1" and rows["clicks"].split()[1] == "1"
    assert rows["refused deliveries"].endswith("  3                     only `update --retry` learns their events")
    assert rows["rows of the event log"].endswith("  2,100                 2,100 different events in 3 deliveries")


def test_diff_leads_with_the_same_queries_and_prints_qualities_as_fractions(
    job: NightlyJob, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answer(capsys, "diff", "1", "2", "--store", str(job.store.folder)).splitlines()
    assert lines[0] == "Quality on the same queries: version 1 and version 2" and max(map(len, lines)) <= 100
    rows = {line[2:].partition("  ")[0]: line for line in lines if line.startswith("  ")}
    values = [float(rows[f"ndcg@20 of version {number}"].split()[4]) for number in (1, 2)]
    difference = float(rows["difference"].split()[1])
    assert all(0 <= value <= 1 for value in values) and difference == pytest.approx(values[1] - values[0], abs=2e-4)
    assert "positive = version 2 is better" in rows["difference"] and "95 % interval" in rows["difference"]
    assert any(re.fullmatch(r"The top-20 lists of \d+ sampled users share \d+ % of their items\.", x) for x in lines)
    assert "Do not compare quality: it was measured on different days." in " ".join(lines)
    assert not re.search(r"\w_\w", "\n".join(lines))


def test_diff_says_in_one_sentence_that_deleted_files_cannot_be_compared(
    job: NightlyJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job.store.move_pointer(2, "promote")
    learn(job, days(3)[3], "three")
    assert 1 in collect_garbage(job.store, keep=1)
    text = answer(capsys, "diff", "1", "2", "--store", str(job.store.folder))
    assert text.splitlines()[1] == "  The files of version 1 were deleted, so it cannot be queried."
    assert "1,500" in text  # what its manifest holds is shown


def test_an_id_of_the_wrong_type_is_a_wrong_argument_not_a_wrong_log(
    job: NightlyJob, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["recommend", "u42"], ["inspect", "user", "u42"], ["explain", "u42", "3"], ["similar", "i3"]):
        assert main([*command, "--store", str(job.store.folder)]) == 2
        assert "integer" in capsys.readouterr().err
