"""What `fit` and `update` print: progress, labelled blocks with units and directions, and each note once a week."""

from __future__ import annotations

import io
import json
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from freshrec.cli.app import main
from freshrec.cli.version_text import fit_lines, next_commands, update_lines, verdict_sentence
from freshrec.data.synthetic import make_world
from freshrec.nightly.notes import Note, count_of, current_notes, notes_of, notes_to_print, with_notes
from freshrec.progress import Progress, listen, report_epoch, report_progress
from freshrec.recommender.progress import ProgressBar, ProgressLines, format_duration
from freshrec.store.manifest import Manifest
from freshrec.text_layout import format_moment

MONDAY = datetime.fromisoformat("2025-06-02T04:15:00+00:00")


def version(number: int, notes: tuple[Note, ...] = (), day: float = 0, **changes: Any) -> Manifest:
    """Version `number`, made `day` days after MONDAY, with its parent one less."""
    made_at = (MONDAY + timedelta(days=day)).isoformat(timespec="seconds")
    fields = {"kind": "update", "parent": number - 1 or None, "recipe": {}, "spans_seen": number, "sizes": {}}
    return with_notes(Manifest.model_validate({"id": number, "made_at": made_at, **fields, **changes}), notes)


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a log of 3,000 events and the 400 after it, with 10 of them twice."""
    frame = make_world("drift", users=200, items=80, events=3400).log.frame.select("user_id", "item_id", "time")
    frame[:3000].write_parquet(tmp_path / "log.parquet")
    pl.concat([frame[3000:], frame[3000:3010]]).write_parquet(tmp_path / "night.parquet")
    frame[3000:].with_columns(user_id=pl.lit(7)).write_parquet(tmp_path / "bot.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> tuple[str, str]:
    """Run a command and return its stdout and stderr."""
    capsys.readouterr()
    assert main(line.split()) == code
    out, err = capsys.readouterr()
    return out, err


# --- notes -----------------------------------------------------------------------------------------------------------

FEW, WEAK = Note("few-deliveries", "The store has no earlier deliveries."), Note("weak-test-older", "12 of 100 users.")


def test_a_note_is_printed_on_the_first_night_and_again_after_seven_days() -> None:
    nights = [version(1, kind="fit")] + [version(n, (FEW,), day=n - 2) for n in range(2, 18)]
    printed_on = [night.id - 2 for n, night in enumerate(nights) if notes_to_print(nights[:n], night)[0]]
    assert printed_on == [0, 7, 14]


def test_a_note_with_other_numbers_is_the_same_note_and_another_code_is_a_new_one() -> None:
    first, later = version(2, (FEW,)), Note("few-deliveries", "The store has 1 earlier delivery.")
    assert notes_to_print([version(1), first], version(3, (later, WEAK), day=1)) == ([WEAK.text], 1)


def test_a_job_that_starts_some_seconds_earlier_after_a_week_prints_the_note_again() -> None:
    # Each night starts 5 seconds before the same time of day, so the 8th one is 35 seconds short of 7 days.
    nights = [version(n + 1, (FEW,), day=n - 5 * n / 86_400) for n in range(9)]
    assert [notes_to_print(nights[:n], nights[n])[1] for n in range(9)] == [0, 1, 1, 1, 1, 1, 1, 0, 1]


def test_refused_nights_print_a_note_once_although_none_is_the_parent_of_the_next() -> None:
    nights = [version(1, kind="fit")]
    nights += [version(n, (FEW,), day=n - 2, parent=1, promoted=False, goes_live=False) for n in range(2, 12)]
    printed_on = [night.id - 2 for n, night in enumerate(nights) if notes_to_print(nights[:n], night)[0]]
    assert printed_on == [0, 7]


def test_a_version_that_lies_in_the_future_silences_no_note() -> None:
    later = version(2, (FEW,), day=90)  # the clock of the machine was wrong
    assert notes_to_print([version(1), later], version(3, (FEW,), day=1)) == ([FEW.text], 0)
    assert notes_to_print([version(1), later, version(3, (FEW,), day=1)], version(4, (FEW,), day=2)) == ([], 1)


@pytest.mark.parametrize("made_at", ["yesterday", "", "2025-06-02T04:15:00", "0001-01-01T00:00:00"])
def test_a_version_without_a_readable_time_has_printed_no_note(made_at: str) -> None:
    damaged = version(2, (FEW,)).model_copy(update={"made_at": made_at})
    assert notes_to_print([version(1), damaged], version(3, (FEW,), day=1)) == ([FEW.text], 0)
    assert notes_to_print([version(1)], damaged) == ([FEW.text], 0)
    assert isinstance(format_moment(made_at), str)


@pytest.mark.parametrize("codes", [None, 3, "x", {"few": 1}, ["a", "b"]])
def test_damaged_codes_of_notes_are_those_of_a_version_without_codes(codes: object) -> None:
    damaged = version(2, (FEW,)).model_copy(update={"data": {"note_codes": codes}})
    assert notes_of(damaged) == [Note(FEW.text, FEW.text)] and current_notes([damaged]) == [FEW.text]
    assert notes_to_print([version(1), damaged], version(3, (FEW,), day=1)) == ([FEW.text], 0)


def test_what_happened_to_one_version_alone_is_printed_every_time() -> None:
    forced = Note("forced", "It was promoted by --force: the fair.")
    assert notes_to_print([version(1), version(2, (forced,))], version(3, (forced,), day=1)) == ([forced.text], 0)


def test_manifests_without_codes_of_notes_open_and_every_note_of_theirs_is_printed() -> None:
    store = Path(__file__).parent / "gold" / "store-0.1.0-popularity" / "versions" / "2" / "manifest.json"
    content = json.loads(store.read_text())
    content = content.get("content", content)
    old = version(2, notes=()).model_copy(update={"notes": content["notes"], "data": content["data"]})
    assert len(old.notes) > 0 and "note_codes" not in old.data
    assert [note.text for note in notes_of(old)] == old.notes
    assert notes_to_print([version(1)], old) == (old.notes, 0)


def test_the_current_notes_are_those_of_the_live_version_and_a_copy_keeps_those_of_its_parent() -> None:
    copy = version(3, (Note("unchanged", "The delivery had no new events."),), kind="no rows")
    chain = [version(1, (WEAK,)), version(2, (FEW,)), copy]
    assert current_notes(chain) == ["The delivery had no new events.", FEW.text]
    assert current_notes(chain[:2]) == [FEW.text]


def test_numbers_have_their_nouns() -> None:
    assert [count_of(n, "row") for n in (0, 1, 2, 1234)] == ["no rows", "1 row", "2 rows", "1,234 rows"]
    assert count_of(1, "query", "queries") == "1 query" and count_of(2, "query", "queries") == "2 queries"


# --- blocks ----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "new_events": 689.0, "new_users": 1.0, "new_items": 0.0, "wait_s": 12.34, "full_s": 30.4,
    "ndcg@20": 0.1994, "ndcg@20 live": 0.196, "low": -0.0021, "high": 0.0089, "forgetting": 0.0012,
}  # fmt: skip


def test_the_block_of_an_update_has_the_verdict_first_and_says_which_way_numbers_point() -> None:
    promoted = version(7, numbers=NUMBERS, data={"compared_users": [116, 250]})
    assert verdict_sentence(promoted) == "Version 7 is live (updated from version 6)."
    assert update_lines(promoted) == [
        ("New", "689 events, 1 new user, 0 new items"),
        ("Quality", "ndcg@20 0.1994, version 6 0.1960 (higher is better; 116 users in the newest events)"),
        ("Difference", "+0.0034 (95 % interval -0.0021 to +0.0089)"),
        ("Forgetting", "+0.0012 ndcg@20 on older events (250 users); positive = lost"),
        ("Time", "12.3 s (estimate for a full retrain: 30 s)"),
    ]


def test_too_few_users_are_said_to_be_too_few_and_old_versions_have_no_number_of_users() -> None:
    without_interval = {name: value for name, value in NUMBERS.items() if name not in ("low", "high")}
    few = version(7, numbers=without_interval, data={"compared_users": [1, 0]})
    texts = dict(update_lines(few))
    assert texts["Quality"].endswith("(higher is better; only 1 user in the newest events, too few to compare)")
    assert "Difference" not in texts and texts["Forgetting"] == "+0.0012 ndcg@20 on older events; positive = lost"
    old = dict(update_lines(version(7, numbers=NUMBERS)))
    assert old["Quality"] == "ndcg@20 0.1994, version 6 0.1960 (higher is better)"


def test_the_verdict_of_refused_forced_and_unchanged_versions_is_plain() -> None:
    refused = version(7, promoted=False, goes_live=False)
    assert verdict_sentence(refused) == "Version 7 was refused; version 6 stays live."
    forced = version(7, promoted=False)
    assert verdict_sentence(forced) == (
        "Version 7 is live because of --force, although the gate refused it (updated from version 6)."
    )
    assert "a copy of version 6" in verdict_sentence(version(7, kind="no rows"))


def test_a_full_retrain_is_a_line_of_its_own_and_its_time_is_measured() -> None:
    numbers = NUMBERS | {"full_gain": -0.001, "full_low": -0.003, "full_high": 0.001}
    texts = dict(update_lines(version(7, numbers=numbers)))
    assert texts["Retrain"] == (
        "ndcg@20 -0.0010 (positive = the full retrain is better; 95 % interval -0.0030 to +0.0010); the update was kept"
    )
    assert texts["Time"] == "12.3 s, 30.4 s of it for the full retrain"
    better = dict(update_lines(version(7, numbers=numbers | {"full_gain": 0.001})))
    assert better["Retrain"].startswith("ndcg@20 +0.0010 (") and better["Retrain"].endswith("; it was taken")


def test_forgetting_names_its_metric_although_the_newest_events_were_not_measured() -> None:
    late = version(7, numbers={"forgetting": 0.0146}, data={"metric": "hr@20", "compared_users": [0, 75]})
    assert dict(update_lines(late))["Forgetting"] == "+0.0146 hr@20 on older events (75 users); positive = lost"


def test_users_whose_interests_changed_are_counted_only_if_there_are_any() -> None:
    numbers = NUMBERS | {"gained_interests": 0.0, "lost_interests": 3.0}
    assert dict(update_lines(version(7, numbers=numbers)))["New"] == (
        "689 events, 1 new user, 0 new items, 3 users lost an interest"
    )


def test_the_block_of_a_fit_says_what_was_read_and_measured() -> None:
    numbers = {"new_events": 3.0, "wait_s": 1.0, "asked": 1.0, "hr@10": 0.5, "hr@10 popularity": 0.25}
    fitted = version(1, kind="fit", numbers=numbers, sizes={"events": 3000, "users": 20, "items": 1000})
    assert fit_lines(fitted, "2025-01-01 to 2025-06-01", ["2 duplicates skipped"]) == [
        ("Read", "3,000 events, 20 users, 1,000 items; 2025-01-01 to 2025-06-01; 2 duplicates skipped"),
        ("Quality", "hr@10 0.5000, popularity baseline 0.2500 (higher is better; 1 held-out query)"),
        ("Time", "1.0 s"),
    ]


def test_the_next_commands_can_be_pasted_whatever_the_names() -> None:
    assert next_commands(Path("my shop"), "o'hara")[1] == "freshrec recommend --store 'my shop' 'o'\"'\"'hara'"
    assert next_commands(Path("shop"), -5)[1] == "freshrec recommend --store shop -- -5"


# --- the commands ----------------------------------------------------------------------------------------------------


def test_fit_ends_with_a_block_and_commands_that_run(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, "fit log.parquet --store shop --model item-knn")
    lines = out.splitlines()
    assert lines[0] == "Version 1 is live in shop."
    assert [line[:13].strip() for line in lines[1:4]] == ["Read", "Quality", "Time"]
    assert "3,000 events, " in lines[1] and re.search(r"\d{4}-\d\d-\d\d(T\S+)? to \d{4}", lines[1])
    assert re.search(
        r"ndcg@20 0\.\d{4}, popularity baseline 0\.\d{4} \(higher is better; \d+ held-out queries\)$", lines[2]
    )
    # 5 % of 3,000 events are held out
    assert re.sub(r"\[\d+ s\] ", "", err).splitlines() == [
        "read: 3,000 rows of log.parquet",
        "storing 3,000 events",
        "splitting: the newest 150 events held out",
        "counting: 2,850 events",
        f"measuring: {re.findall(r'([0-9]+) held-out', out)[0]} held-out queries",
    ]
    assert lines[-2] == "Next: freshrec update NEW-EVENTS --store shop"
    assert main(lines[-1].split()[1:]) == 0


def test_the_progress_of_a_training_names_epochs_and_held_out_quality(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = printed(
        capsys, "fit log.parquet --store shop --model mf:d=4 --strategy finetune:fit.max_epochs=3:fit.epochs=2"
    )
    assert re.search(r"\] training: epoch 1 of at most 3, held-out ndcg@20 0\.\d{4}\n", err)
    assert re.search(r"\] training: epoch 1 of \d\n", err)  # then as many as were best, on all events


def test_with_json_stderr_is_empty_and_an_update_in_a_pipe_prints_no_progress(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = printed(capsys, "fit log.parquet --store shop --model popularity --json")
    assert err == "" and json.loads(out)["id"] == 1
    out, err = printed(capsys, "update night.parquet --store shop")
    assert err == "" and out.splitlines()[:2] == [
        "night.parquet: 410 rows: 400 new, 10 duplicates skipped",
        "Version 2 is live (updated from version 1).",
    ]


def test_a_refused_update_says_why_what_stays_and_what_to_type(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fit log.parquet --store shop --model popularity")
    out, err = printed(capsys, "update bot.parquet --store shop", 8)
    assert out.splitlines()[1] == "Version 2 was refused; version 1 stays live."
    assert "  Reason      100 % of the rows belong to one user." in out
    assert max(map(len, out.splitlines())) <= 100
    assert err == (
        "error: The gate refused version 2 of shop; version 1 is live. To learn the events anyway, run "
        '`freshrec update --retry 2 --force --reason "..." --store shop`.\n'
    )
    out, _ = printed(capsys, "update --retry 2 --force --reason fair --store shop")
    assert (
        "Version 3 is live because of --force, although the gate refused it (updated from version 1, retry of "
        "version 2)."
    ) in " ".join(out.split())
    assert "It was promoted by --force: fair" in " ".join(out.split())


def test_notes_that_were_printed_this_week_become_one_line(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fit log.parquet --store shop --model popularity")
    frame = pl.read_parquet("night.parquet").unique(maintain_order=True)
    for n in (0, 1):
        frame[200 * n : 200 * (n + 1)].write_parquet(f"{n}.parquet")
    first = printed(capsys, "update 0.parquet --store shop --force --reason fair")[0]
    assert "The store has no earlier deliveries." in first and "still appl" not in first
    out = printed(capsys, "update 1.parquet --store shop --force --reason fair")[0]
    assert "earlier deliver" not in out
    assert re.search(
        r"  Notes       (1 earlier note still applies|\d earlier notes still apply); "
        r"see `freshrec history --last 1 --long --store shop`.",
        out,
    )
    found = json.loads(printed(capsys, "history --store shop --json")[0])["versions"]
    assert any("1 earlier delivery" in note for note in found[-1]["notes"])  # JSON has all of them


MISTAKES = [
    ("update --store shop --force", 2, '--force needs a reason, which is stored in the history. Add --reason "...".'),
    ("update x.parquet --store shop --dry-run --retry 1", 2, "--dry-run cannot be combined with --retry or --force."),
    (
        "update x.parquet --store shop --full-every often",
        2,
        '--full-every must be a number of updates or auto, not "often"',
    ),
    ("update x.parquet --store shop", 3, "x.parquet"),
    ("update --store shop --retry 1", 2, "--retry 1: the live version has learned all events of version 1 already."),
    ("fit log.parquet --store s2 --model mf --budget 1m", 2, "For --model mf, set the number of epochs in --strategy"),
    ("fit log.parquet --store shop", 2, "shop already holds a store. Use `freshrec update`, or choose another folder."),
]


@pytest.mark.parametrize(("line", "code", "text"), MISTAKES)
def test_an_error_names_what_was_typed(
    line: str, code: int, text: str, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, "fit log.parquet --store shop --model popularity")
    out, err = printed(capsys, line, code)
    assert text in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_a_dry_run_has_the_error_of_the_update(column: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fit log.parquet --store shop --model popularity")
    frame = pl.read_parquet("night.parquet")
    frame.with_columns(pl.format("u{}", column).alias(column)).write_parquet(
        "other.parquet"
    )  # text instead of integers
    preview = printed(capsys, "update other.parquet --store shop --dry-run", 3)
    assert preview == printed(capsys, "update other.parquet --store shop", 3)
    assert preview[1].startswith("error: other.parquet: ") and preview[1].count("\n") == 1


def test_a_fit_that_fails_leaves_no_store_and_no_progress(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / "empty.csv").write_text("user_id,item_id,timestamp\n")
    _, err = printed(capsys, "fit empty.csv --store shop", 3)
    assert err.count("\n") == 1 and not (logs / "shop").exists()
    shutil.rmtree(logs / "shop", ignore_errors=True)


# --- progress --------------------------------------------------------------------------------------------------------


def test_only_who_listens_receives_reports() -> None:
    found: list[Progress] = []
    report_progress("before")
    with listen(found.append):
        report_progress("counting", detail="3 events")
        report_epoch(2, 9, "held-out ndcg@20 0.1000")
        with listen(None):
            report_progress("inside")
    report_progress("after")
    assert found == [
        Progress("counting", 0, 0, "3 events"),
        Progress("training", 2, 9, "epoch 2 of at most 9, held-out ndcg@20 0.1000"),
    ]


def test_lines_are_few_epochs_are_printed_at_powers_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    show = ProgressLines()
    for epoch in range(1, 31):
        show(Progress("training", epoch, 30, f"epoch {epoch} of 30"))
    show.clear()
    assert re.findall(r"epoch (\d+) of", capsys.readouterr().err) == ["1", "2", "4", "8", "16"]


def test_the_bar_shows_stage_detail_and_time_left_and_goes_away() -> None:
    out = io.StringIO()
    show = ProgressBar(Console(file=out, force_terminal=True, width=140))
    show(Progress("counting", detail="3 events"))
    show(Progress("training", 1, 4, "epoch 1 of at most 4"))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "counting" in text and "3 events" in text
    assert "epoch 1 of at most 4, at most 0 s left" in text
    show.clear()
    assert out.getvalue().endswith("\x1b[2K")  # the line is erased
    show.clear()


def test_durations_are_short() -> None:
    assert [format_duration(s) for s in (0.4, 45, 150, 9000)] == ["0 s", "45 s", "2 min", "2.5 h"]
