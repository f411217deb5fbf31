"""The report of a log: each number computed by hand, and each warning on a log that triggers it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import polars as pl
import pytest

from freshrec.cli.app import main
from freshrec.data.log import read_log
from freshrec.data.validate import LogReport, validate_log

NOON, DAY = 1_600_000_000, 86_400  # seconds
N = 4000


def report_of(**columns: object) -> LogReport:
    return validate_log(read_log(pl.DataFrame(columns)))


def steady(**changes: object) -> LogReport:
    """40 users and 50 items in turn, one row every 15 minutes: a log without warnings."""
    columns = {
        "user_id": [i % 40 for i in range(N)],
        "item_id": [i % 50 for i in range(N)],
        "timestamp": [NOON + 900 * i for i in range(N)],
    }
    return report_of(**{**columns, **changes})


def test_a_report_counts_what_the_log_holds() -> None:
    report = report_of(
        user_id=[1, 1, 1, 2, 2],
        item_id=[5, 5, 5, 5, 6],
        timestamp=[NOON, NOON, NOON + 9, NOON + 8, NOON + 10],
        category=[1, None, 1, 1, None],
    )
    assert (report.rows, report.users, report.items) == (5, 2, 2)
    assert (report.first, report.last) == ("2020-09-13T12:26:40+00:00", "2020-09-13T12:26:50+00:00")
    assert report.duplicates == 1  # row 2 is the same as row 1
    assert report.ties == 2 / 5  # rows 1 and 2
    assert report.out_of_order == 1 / 5  # row 4 is earlier than row 3
    assert report.repeats == pytest.approx(2 / 5)  # rows 2 and 3 have the pair (1, 5) of row 1
    assert report.nulls == {"category": 2}


def test_duplicates_are_equal_event_ids_where_there_are_any() -> None:
    assert steady(event_id=[f"e{i // 2}" for i in range(N)]).duplicates == N // 2


def test_facts_that_need_timestamps_are_none_without_them() -> None:
    report = report_of(user_id=[1, 1], item_id=[1, 1], period=[0, 1])
    assert (report.first, report.duplicates, report.ties) == (None, None, None)


def test_exposures_are_a_share_of_the_rows() -> None:
    assert steady(label=[0, 1, 1, None] * (N // 4)).exposures == 1 / 4


def test_a_steady_log_is_cut_by_time_and_gets_no_warning() -> None:
    report = steady()
    # 4000 rows: 2000 behind the base block, at 1000 a span.
    assert (report.suggested_by, report.suggested_spans, report.warnings) == ("count-alpha", 2, ())


def test_a_log_with_periods_is_cut_by_them() -> None:
    report = steady(period=[i // 1000 for i in range(N)])
    assert (report.suggested_by, report.suggested_spans) == ("period", 3)


def test_a_bursty_log_is_cut_by_count() -> None:
    # The last 2000 rows: 1900 within half an hour, then 100 over 100 days, so one half of that time is almost empty.
    times = [NOON + i for i in range(3900)] + [NOON + 4000 + DAY * i for i in range(100)]
    assert steady(timestamp=times).suggested_by == "count"


def only(report: LogReport, words: str) -> str:
    """The one warning with these words."""
    [found] = [warning for warning in report.warnings if words in warning]
    return found


def test_it_warns_of_users_with_a_single_day() -> None:
    # User i // 100 has 100 rows in a row, a quarter of an hour apart: 25 hours. At 60 s apart: 100 minutes.
    users = [i // 100 for i in range(N)]
    days = [NOON + DAY * (i // 100) + 60 * (i % 100) for i in range(N)]
    assert only(steady(user_id=users, timestamp=days), "on one day").startswith("100.0 % of the users")


def test_it_warns_of_a_half_empty_timeline() -> None:
    # 120 rows (3 %) in the first 120 days, the rest within the next 97 (3880 rows at 2160 s).
    times = [NOON + DAY * i for i in range(120)] + [NOON + DAY * 120 + 2160 * i for i in range(N - 120)]
    # The log lasts 120 + 97 = 217 days, so its first half ends on day 108: 109 rows of 4000 are 2.7 %.
    assert "The first half of the time range holds only 2.7 % of the rows" in only(
        steady(timestamp=times), "time range"
    )


def test_it_warns_where_most_test_items_would_be_unseen() -> None:
    # Each item has 10 rows in a row, so the last 1000 rows have only items of their own.
    assert only(steady(item_id=[i // 10 for i in range(N)]), "No model can").startswith(
        "100.0 % of the rows in the last span"
    )


def test_it_warns_of_far_off_timestamps() -> None:
    # The rest of the log is 42 days long.
    early = [NOON - 100 * DAY, NOON - 99 * DAY]
    report = steady(timestamp=early + [NOON + 900 * i for i in range(N - 2)])
    assert "2 rows before 2020-09-13" in only(report, "Outlying")
    report = steady(timestamp=[NOON + 900 * i for i in range(N - 1)] + [NOON + 200 * DAY])
    assert "1 row after 2020-10-25" in only(report, "Outlying")  # 3998 quarters of an hour are 41.6 days


def test_it_warns_of_baskets() -> None:
    assert only(steady(timestamp=[NOON + DAY * (i // 400) for i in range(N)]), "share user and timestamp").startswith(
        "100.0 %"
    )


def test_it_warns_of_duplicates_and_says_that_each_event_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last 40 of the 4000 rows (1.0 %) are copies of the row with the number 3959.
    copied = [min(i, 3959) for i in range(N)]
    columns = {
        "user_id": [i % 40 for i in copied],
        "item_id": [i % 50 for i in copied],
        "timestamp": [NOON + 900 * i for i in copied],
    }
    sentence = (
        "40 rows (1.0 %) have the user, item and timestamp of another row. Each event counts once: replay, fit, "
        "update and the Python API skip these duplicates."
    )
    assert only(report_of(**columns), "duplicates") == sentence
    pl.DataFrame(columns).write_parquet(tmp_path / "log.parquet")
    assert main(["validate", str(tmp_path / "log.parquet"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["duplicates"] == 40 and sentence in fields["warnings"]
    assert main(["validate", str(tmp_path / "log.parquet")]) == 0
    assert f"Warning: {sentence}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"event_id": ["a", "a"], "timestamp": [NOON, NOON + 1]}, "event_id or the user, item and timestamp"),
        ({"event_id": ["a", "a"], "period": [0, 1]}, "event_id"),
        ({"label": [0, 0], "timestamp": [NOON, NOON]}, "user, item, timestamp and label"),
    ],
)
def test_the_warning_of_duplicates_names_the_columns_that_identify_an_event(
    columns: dict[str, object], keys: str
) -> None:
    # Row 2 is the same event as row 1: 1 of 2 rows is 50 %.
    report = report_of(user_id=[1, 1], item_id=[1, 1], **columns)
    assert only(report, "duplicates").startswith(f"1 row (50.0 %) has the {keys} of another row.")


def test_without_timestamps_nothing_is_a_duplicate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Rows 1 and 2 are equal, but without a timestamp they may be two events.
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,period\n1,a,0\n1,a,0\n2,a,1\n")
    assert main(["validate", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Duplicates none: without a timestamp in every row, each row is an event of its own." in shown
    assert "skip these duplicates" not in shown


def test_it_warns_of_logs_too_small_to_compare_anything() -> None:
    assert only(report_of(user_id=[1, 1], item_id=[1, 2], timestamp=[NOON, NOON + 1]), "single user")
    assert only(report_of(user_id=[1, 2], item_id=[1, 2], timestamp=[NOON, NOON]), "cannot be split")
    assert only(report_of(user_id=[1, 2], item_id=[1, 2], timestamp=[NOON, NOON + 1]), "too few")


def test_the_command_prints_every_fact_and_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"uid,item_id,timestamp,event\n1,a,{NOON},pv\n1,b,{NOON + 1},buy\n")
    command = ["validate", str(path), "--columns", "user_id=uid", "--events", "pv"]
    assert main([*command, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields.keys() == LogReport.__dataclass_fields__.keys()
    assert (fields["rows"], fields["unit"]) == (1, "s")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2020-09-13T12:26:40+00:00" in printed
    assert "0.0 % of rows share user and timestamp with another row" in printed
    assert f"freshrec fit {path} --columns user_id=uid --events pv --store shop" in printed


def suggested_commands(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The words of each command that `validate` suggests, without "freshrec"."""
    assert main(["validate", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("  freshrec ")]


def test_a_log_with_exposures_can_be_replayed_with_and_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    rows = "".join(f"{i % 40},{i % 50},{NOON + 900 * i},{i % 3 % 2}\n" for i in range(N))
    path.write_text(f"user_id,item_id,timestamp,label\n{rows}")
    plain, clicks, fit = suggested_commands(capsys, str(path))
    assert plain[0] == clicks[0] == "replay" and "--exposures" not in plain and fit[0] == "fit"
    assert "--exposures" in clicks
    assert main(plain[:-1] + ["--models", "popularity", "--strategies", "absorb", "--plan"]) == 0
    assert main(clicks) == 0


def test_a_log_with_bad_rows_is_fitted_with_a_quarantine_file_and_not_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i % 40},{i % 50},{NOON + 900 * i}\n" for i in range(N))
    Path("log.csv").write_text(f"user_id,item_id,timestamp\n1,,{NOON}\n{rows}")
    (fit,) = suggested_commands(capsys, "log.csv", "--quarantine", "q.csv")
    assert fit == ["fit", "log.csv", "--store", "shop", "--quarantine", "q.csv"]
    assert main([*fit, "--model", "popularity"]) == 0
    # without bad rows the option is not needed
    Path("log.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    replay, fit = suggested_commands(capsys, "log.csv", "--quarantine", "q.csv")
    assert replay[0] == "replay" and fit == ["fit", "log.csv", "--store", "shop"]


def test_rows_without_timestamps_among_others_are_counted_once_and_the_time_range_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Row 2 has a timestamp, rows 1 and 3 have none; the periods order all of them.
    path = tmp_path / "log.csv"
    path.write_text(f"user_id,item_id,timestamp,period\n1,a,,0\n1,b,{NOON},0\n2,a,,1\n")
    assert main(["validate", str(path)]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    facts = {" ".join(words[:2]): words[2] for words in lines if len(words) == 3}
    assert facts["Missing values"] == "timestamp in 2 of 3 rows"
    assert facts["Time range"] == "unknown: 2 of 3 rows have no timestamp"
    path.write_text("user_id,item_id,period\n1,a,0\n1,b,0\n2,a,1\n")
    assert main(["validate", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "Missing values    none\n" in shown and "Time range        unknown: the log has no timestamps\n" in shown


def test_a_report_in_a_pipe_has_at_most_100_columns_and_no_spaces_at_line_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # tests in several processes have 80 there
    path = tmp_path / "log.csv"
    rows = "".join(f"{i % 40},{i % 50},{NOON + 900 * i}\n" for i in range(N))
    path.write_text(f"user_id,item_id,timestamp\n{rows}")
    assert main(["validate", str(path)]) == 0
    report, _, _ = capsys.readouterr().out.partition("\nNext")  # the commands after it have the path of the log
    lines = report.splitlines()
    assert max(map(len, lines)) <= 100 and all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) > 80  # the default of a pipe is 100 columns, not 80
    # the rule is explained next to its name
    split = "a base block and 2 spans, by count-alpha (half of the rows, then spans of equal duration)"
    assert split in " ".join(report.split())
