"""Rows: each line of a text file and each row of a table is read once, or the log is refused with the place."""

from __future__ import annotations

import csv
import gzip
import io
import os
import shutil
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrec.cli import app
from freshrec.data.formats import open_table
from freshrec.data.log import read_log
from freshrec.errors import LogError, NoRowsError, OptionError
from freshrec.nightly.job import hash_source

NOON = 1_600_000_000  # 2020-09-13 12:26:40 UTC, in seconds
HEADER = "user_id,item_id,title,timestamp\n"


def row(number: int, title: str = "a") -> str:
    return f"u{number},i{number},{title},{NOON}\n"


def tabs(text: str) -> str:
    return text.replace(",", "\t")


def users_of(path: Path, **options: object) -> list[object]:
    return read_log(path, **options).frame["user_id"].to_list()  # type: ignore[arg-type]


def part(*users: object, **columns: object) -> pl.DataFrame:
    frame = pl.DataFrame({"user_id": users, "item_id": 1, "timestamp": NOON})
    return frame.with_columns(**{name: pl.lit(value) for name, value in columns.items()})


def write(path: Path, frame: pl.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)


OPEN_AND_CLOSED = HEADER + row(1) + row(2, '"Heroes') + row(3) + row(4, 'So Kind"') + row(5)
BYTE_ORDER_MARK = "\ufeff"

# name of a file -> content, users of its rows
READABLE: dict[str, tuple[str | bytes, list[str]]] = {
    "quote-over-lines.tsv": (tabs(OPEN_AND_CLOSED), ["u1", "u2", "u3", "u4", "u5"]),
    "inches.tsv": (tabs(HEADER + row(1, '5" disc') + row(2, '7" disc') + row(3, '"x"y')), ["u1", "u2", "u3"]),
    "quoted.tsv": (tabs('"user_id","item_id","timestamp"\n"u1","i1",1600000000\n'), ["u1"]),
    "line-break.tsv": (tabs(HEADER + row(1, '"a\nb"') + row(2)), ["u1", "u2"]),
    "line-break.csv": (HEADER + row(1, '"a\n\nb, c"') + row(2, '"say ""hi"""') + row(3), ["u1", "u2", "u3"]),
    # Both lines of the first row have 4 fields on their own, but only the first one has a time in the third.
    "text-last.csv": (f'user_id,item_id,timestamp,text\nu1,i1,{NOON},"a\nb, c, d, e"\nu2,i2,{NOON},f\n', ["u1", "u2"]),
    "commas.csv": (HEADER + row(1, '"a, b"') + row(2, '""'), ["u1", "u2"]),
    "blank.csv": (HEADER + "\n" + row(1) + "\n\n" + row(2) + "\n\n", ["u1", "u2"]),
    "blank-and-break.csv": (HEADER + row(1, '"a\n\nb"') + "\n" + row(2) + "\n", ["u1", "u2"]),
    "blank-first.csv": ("\n\n" + HEADER + row(1) + "\n" + row(2), ["u1", "u2"]),
    "windows.csv": ((HEADER + row(1) + "\n" + row(2)).replace("\n", "\r\n"), ["u1", "u2"]),
    "mark.csv": (BYTE_ORDER_MARK + HEADER + row(1), ["u1"]),
    "mark.tsv": (tabs(BYTE_ORDER_MARK + HEADER + row(1)), ["u1"]),
    "mark-and-quotes.csv": (BYTE_ORDER_MARK + f'"user_id","item_id","timestamp"\n"u1","i1",{NOON}\n', ["u1"]),
    "no-line-end.csv": ((HEADER + row(1) + row(2))[:-1], ["u1", "u2"]),
    "trailing.csv": ((HEADER + row(1)).replace("\n", ",\n"), ["u1"]),
    "unread-twice.csv": (HEADER.replace("title", "x,x") + row(1, "a,b"), ["u1"]),
    "long-line.csv": (HEADER + row(1, "a" * 1_000_000) + row(2), ["u1", "u2"]),
    "members.csv.gz": (gzip.compress((HEADER + row(1)).encode()) + gzip.compress(row(2).encode()), ["u1", "u2"]),
    "packed.csv": (gzip.compress((HEADER + row(1)).encode()), ["u1"]),
    "mark.jsonl": (BYTE_ORDER_MARK + f'{{"user_id":"u1","item_id":1,"timestamp":{NOON}}}\n', ["u1"]),
    "blank.jsonl": (f'\n{{"user_id":"u1","item_id":1,"timestamp":{NOON}}}\n\n', ["u1"]),
}


@pytest.mark.parametrize("name", READABLE)
def test_every_line_with_all_its_fields_is_a_row(tmp_path: Path, name: str) -> None:
    content, users = READABLE[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert users_of(tmp_path / name) == users


OBJECT = f'{{"user_id":"u1","item_id":1,"timestamp":{NOON}}}'

# name of a file -> content, and what the message must say
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "quote-over-lines.csv": (OPEN_AND_CLOSED, "a quotation mark opens in line 3 and closes in line 5"),
    "beside-commas.csv": (
        OPEN_AND_CLOSED + row(6, '"a, b"') + row(7, '"c\nd"'),
        "opens in line 3 and closes in line 5",
    ),
    "over-a-blank-line.csv": (OPEN_AND_CLOSED.replace("u3", "\nu3"), "opens in line 3 and closes in line 6"),
    "inches.csv": (HEADER + row(1) + row(2, '5" disc'), "line 3 has a stray quotation mark in column title"),
    "two-inches.csv": (HEADER + row(1, '5" disc') + row(2, '7" disc'), "line 2 has a stray quotation mark in column"),
    "glued.csv": (HEADER + row(1, '"x"y'), "line 2 has a stray quotation mark in column title"),
    "unclosed.csv": (HEADER + row(1) + row(2, '"x'), "line 3 has a stray quotation mark in column title"),
    "quoted-comma.csv": (
        'user_id,item_id,timestamp\nu1,"i1,1600000000"\n',
        "line 2 has 2 fields, but",
    ),
    "fewer.csv": (HEADER + row(1) + "u2,i2\n", "line 3 has 2 fields, but the header has 4"),
    "more.csv": (HEADER + row(1) + row(2, "a,b"), "line 3 has 5 fields, but the header has 4"),
    # The numbers of separators are right in total.
    "fewer-and-more.csv": (HEADER + "u1,i1,1600000000\n" + row(2, "a,b"), "line 2 has 3 fields"),
    "fewer.csv.gz": (gzip.compress((HEADER + "u2,i2\n").encode()), "line 2 has 2 fields, but the header has 4"),
    "zeros.csv": (HEADER + row(1) + "\0" * 50, "line 3 has 1 field, but the header has 4"),
    "trailing.csv": (HEADER + row(1).replace("\n", ",\n"), "line 2 has 5 fields, but the header has 4"),
    "tabs.csv": (tabs(HEADER + row(1)), "has one column, user_id?item_id?title?timestamp. Pass --separator tab"),
    "semicolons.csv": ((HEADER + row(1)).replace(",", ";"), "Pass --separator semicolon"),
    "pipes.tsv": ((HEADER + row(1)).replace(",", "|"), "Pass --separator pipe"),
    "commas.tsv": (HEADER + row(1), "Pass --separator comma"),
    "excel.csv": ("sep=;\n" + (HEADER + row(1)).replace(",", ";"), "starts with the line sep=;. Remove it"),
    "garbage.csv.gz": (gzip.compress((HEADER + row(1)).encode()) + b"garbage", "It may be truncated, damaged"),
    "old-mac.csv": ((HEADER + row(1)).replace("\n", "\r"), "has lines that end in CR alone"),
    "utf-16.csv": ((HEADER + row(1)).encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "utf-16-le.csv": ((HEADER + row(1)).encode("utf-16-le"), "has zero bytes in its header, as UTF-16 has"),
    "utf-16.jsonl": (OBJECT.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "cp1252.csv": ((HEADER + row(1) + row(2, "é")).encode("cp1252"), "is not UTF-8: line 3 holds the byte 0xe9"),
    "zip.csv": (b"PK\x03\x04 and more", "is a zip archive. Unpack it"),
    "cut.csv.gz": (gzip.compress((HEADER + row(1)).encode())[:-12], "It may be truncated"),
    "header-again.csv": (HEADER + row(1) + HEADER + row(2), "data row 2: 'timestamp'"),
    "blank-lines.csv": ("\n\n", "has no header"),
    "array.jsonl": (f"[{OBJECT}]", "is a JSON array"),
    "two-in-a-line.jsonl": (f"{OBJECT}\n{OBJECT}{OBJECT}\n", "cannot be read in line 2"),
    "broken.jsonl": (f'{OBJECT}\n{{"user_id"', "cannot be read in line 2"),
    "text.jsonl": (f'{OBJECT}\n"x"\n', "cannot be read in line 2 (it holds no JSON object)"),
    "number.jsonl": (f"{OBJECT}\n5\n", "cannot be read in line 2 (it holds no JSON object)"),
    "null.jsonl": (f"{OBJECT}\nnull\n", "cannot be read in line 2 (it holds no JSON object)"),
    "nan.jsonl": (OBJECT.replace('"u1"', "NaN"), "cannot be read in line 1 (NaN is no number of JSON)"),
    "infinite.jsonl": (OBJECT.replace('"u1"', "1E400"), "cannot be read in line 1 (1E400 is too large"),
    "blank-lines.jsonl": ("\n\n", "has no rows"),
    "cp1252.jsonl": (OBJECT.replace("u1", "é").encode("cp1252"), "cannot be read in line 1 (it is not UTF-8)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_may_lose_rows_is_refused_with_the_place(tmp_path: Path, name: str) -> None:
    content, complaint = REFUSED[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LogError) as refusal:
        read_log(tmp_path / name)
    assert complaint in str(refusal.value) and str(refusal.value).startswith(name)


def test_a_header_alone_is_a_log_without_rows(tmp_path: Path) -> None:
    for content in (HEADER, HEADER[:-1], HEADER + "\n\n"):
        (tmp_path / "log.csv").write_text(content)
        with pytest.raises(NoRowsError):
            read_log(tmp_path / "log.csv")


@settings(max_examples=60, deadline=None)
@given(
    titles=st.lists(st.text(alphabet='ab,"\n\t; ', max_size=6), min_size=1, max_size=6),
    dialect=st.sampled_from([(".csv", ","), (".tsv", "\t")]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_files_of_the_csv_module_have_the_rows_that_it_wrote(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str], dialect: tuple[str, str], quoting: int
) -> None:
    ending, separator = dialect
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
    writer.writerow(["user_id", "title", "item_id", "timestamp"])
    for number, title in enumerate(titles):
        writer.writerow([number, title, f"i{number}", NOON + number])
    path = tmp_path_factory.mktemp("fuzz") / f"log{ending}"
    path.write_bytes(text.getvalue().encode())
    table = open_table(path).rows.collect()
    assert table["title"].fill_null("").to_list() == titles
    assert users_of(path) == list(range(len(titles)))


@pytest.mark.parametrize(
    ("typed", "separator"),
    [("tab", "\t"), ("\\t", "\t"), (";", ";"), ("semicolon", ";"), ("space", " ")],
)
def test_a_separator_has_a_name_or_is_a_character(tmp_path: Path, typed: str, separator: str) -> None:
    (tmp_path / "log.csv").write_text((HEADER + row(1, '"a"')).replace(",", separator))
    assert users_of(tmp_path / "log.csv", separator=typed) == ["u1"]


@pytest.mark.parametrize("typed", ["", "ab", '"', "a", "\n", "é"])
def test_another_separator_is_refused(tmp_path: Path, typed: str) -> None:
    (tmp_path / "log.csv").write_text(HEADER + row(1))
    with pytest.raises(OptionError, match="Use one character, or comma, tab"):
        read_log(tmp_path / "log.csv", separator=typed)
    with pytest.raises(OptionError, match="has no effect on format"):
        read_log(tmp_path / "log.csv", separator="tab", format="amazon")


def test_updates_read_their_files_with_the_separator_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = [[(user, item) for user in range(8) for item in range(4)], [(user, 5) for user in range(8)]]
    for day, pairs in enumerate(days):
        lines = [f"{user};{item};{NOON + day * 86_400 + user * 60 + item}" for user, item in pairs]
        (tmp_path / f"{day}.csv").write_text("user_id;item_id;timestamp\n" + "\n".join(lines) + "\n")
    options = ["--store", str(tmp_path / "store"), "--json"]
    assert app.main(["fit", str(tmp_path / "0.csv"), *options, "--model", "popularity", "--separator", ";"]) == 0
    assert app.main(["update", str(tmp_path / "1.csv"), *options]) in (0, 1)
    assert "--separator" not in capsys.readouterr().err
    assert app.main(["inspect", "item", "5", "--store", str(tmp_path / "store")]) == 0


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ""])
@pytest.mark.parametrize("stem", ["log[1]", "log?", "log*", "log#1", "log 1%20"])
def test_a_path_is_taken_literally(tmp_path: Path, ending: str, stem: str) -> None:
    for name, user in (("log1", "wrong"), ("logs", "wrong"), (stem, "right")):
        path, frame = tmp_path / f"{name}{ending}", part(user)
        if ending == ".csv":
            frame.write_csv(path)
        elif ending == ".jsonl":
            path.write_bytes(frame.write_ndjson().encode())
        else:
            write(path / "a.parquet" if not ending else path, frame)
    assert users_of(tmp_path / f"{stem}{ending}") == ["right"]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "gone.csv").symlink_to("nowhere.csv")
    for path, complaint in (
        (tmp_path / "pipe.csv", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path / "gone.csv", "There is no file"),
    ):
        for read in (read_log, hash_source):
            with pytest.raises(LogError, match=complaint):
                read(path)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + row(1))
    table = open_table(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open("a") as file:
        file.write(row(2))
    with pytest.raises(LogError, match="log.csv changed while it was read"):
        table.require_unchanged()


def test_deleted_rows_of_a_delta_table_stay_deleted(tmp_path: Path) -> None:
    table = tmp_path / "clicks"
    write_deltalake(table, pl.concat([part(1, 7, event="b u/y"), part(2, event="x")]), partition_by=["event"])
    DeltaTable(table).delete("user_id = 7")
    before = hash_source(table)
    log = read_log(table)
    assert sorted(log.frame.select("user_id", "event").rows()) == [(1, "b u/y"), (2, "x")]
    DeltaTable(table).create_checkpoint()
    assert sorted(users_of(table)) == [1, 2]  # type: ignore[type-var]
    shutil.copytree(table, tmp_path / "my [table] #1%20?")
    assert sorted(users_of(tmp_path / "my [table] #1%20?")) == [1, 2]  # type: ignore[type-var]
    write_deltalake(table, part(3, event="x", extra=1), mode="append", schema_mode="merge")
    assert sorted(users_of(table)) == [1, 2, 3]  # type: ignore[type-var]
    assert hash_source(table) != before
    for inside in (table / "event=x", next((table / "event=x").glob("*.parquet"))):
        with pytest.raises(LogError, match="is a part of the Delta table .*clicks. Pass the whole table"):
            read_log(inside)
    with pytest.raises(LogError, match=f"{tmp_path.name} holds the Delta table .*. Pass that folder"):
        read_log(tmp_path)


def test_a_delta_table_with_deletion_vectors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No writer on this machine makes such a table, so the list of vectors is made up.
    write_deltalake(tmp_path / "clicks", part(1))
    monkeypatch.setattr(DeltaTable, "deletion_vectors", lambda _: pl.DataFrame({"filepath": ["a.parquet"]}))
    with pytest.raises(LogError, match="Delta table with deletion vectors, which freshrec cannot read"):
        read_log(tmp_path / "clicks")


@pytest.mark.parametrize(("kind", "mark"), [("Iceberg", "metadata/v1.metadata.json"), ("Hudi", ".hoodie/x")])
def test_tables_of_other_kinds_are_refused_with_their_parts(tmp_path: Path, kind: str, mark: str) -> None:
    write(tmp_path / "t" / "data" / "a.parquet", part(1))
    (tmp_path / "t" / mark).parent.mkdir()
    (tmp_path / "t" / mark).touch()
    with pytest.raises(LogError, match=f"t is a table of {kind}, which is not supported"):
        read_log(tmp_path / "t")
    for inside in (tmp_path / "t" / "data", tmp_path / "t" / "data" / "a.parquet"):
        with pytest.raises(LogError, match=f"is a part of the {kind} table"):
            read_log(inside)
    with pytest.raises(LogError, match=f"holds the {kind} table t"):
        read_log(tmp_path)


def test_unfinished_and_hidden_parts_are_ignored_with_a_note(tmp_path: Path) -> None:
    for name in ("a.parquet", "deep/b.PARQUET", "_temporary/0/c.parquet", ".d.parquet", "_e.parquet", "_f=1/g.pq"):
        write(tmp_path / name, part(name))
    before = hash_source(tmp_path)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "_h.parquet").touch()
    log = read_log(tmp_path)
    assert sorted(log.frame["user_id"]) == ["_f=1/g.pq", "a.parquet", "deep/b.PARQUET"]
    assert log.notes[0].startswith("Ignored 4 files with a name that starts with . or _ (.d.parquet, _e.parquet")
    assert hash_source(tmp_path) == before  # of the files that are read


def test_a_folder_of_parquet_files_and_other_logs_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", part(1))
    (tmp_path / "README.md").write_text("not a log")
    assert users_of(tmp_path) == [1]
    (tmp_path / "b.csv").write_text(HEADER + row(1))
    with pytest.raises(LogError, match=r"holds b\.csv beside .parquet files"):
        read_log(tmp_path)


def test_names_of_folders_are_columns(tmp_path: Path) -> None:
    no_user = part(0).drop("user_id")
    for folder in ("event=buy/user_id=7", "event=a%2Fb/user_id=8", "event=__HIVE_DEFAULT_PARTITION__/user_id=9"):
        write(tmp_path / "log" / folder / "a.parquet", no_user)
    log = read_log(tmp_path / "log")
    assert sorted(log.frame.select("user_id", "event").rows()) == [(7, "buy"), (8, "a/b"), (9, None)]
    assert users_of(tmp_path / "log", events=("buy",)) == [7]
    # 007 is no numeral, so the column is text. The same bytes in another folder are another log.
    write(tmp_path / "padded" / "user_id=007" / "a.parquet", no_user)
    write(tmp_path / "other" / "user_id=8" / "a.parquet", no_user)
    assert users_of(tmp_path / "padded") == ["007"]
    assert hash_source(tmp_path / "padded") != hash_source(tmp_path / "other")


def test_parts_may_lack_optional_columns_and_differ_in_width(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", part(1))
    write(tmp_path / "b.parquet", part(2, event="buy", note=None).cast({"user_id": pl.Int16}))
    write(tmp_path / "c.parquet", part(3, note="x"))
    rows = read_log(tmp_path).frame.select("user_id", "event").rows()
    assert rows == [(1, None), (2, "buy"), (3, None)]
    write(tmp_path / "d.parquet", part(4, note=5))  # nobody reads the column
    assert len(users_of(tmp_path)) == 4
    (tmp_path / "e.parquet").touch()
    with pytest.raises(LogError, match=r"e\.parquet is an empty file"):
        read_log(tmp_path)


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.parquet", part(1))
    write(tmp_path / "more" / "b.parquet", part(2))
    (tmp_path / "log" / "loop").symlink_to(tmp_path / "log")
    (tmp_path / "log" / "more").symlink_to(tmp_path / "more")
    assert sorted(users_of(tmp_path / "log")) == [1, 2]  # type: ignore[type-var]
    (tmp_path / "log" / "gone.parquet").symlink_to("nowhere.parquet")
    with pytest.raises(LogError, match=r"gone\.parquet is missing, or a link to a missing file"):
        read_log(tmp_path / "log")


FRAME = pd.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [NOON, NOON + 1], "x": [1, 2]})


@pytest.mark.parametrize(
    "frame",
    [
        pd.concat([FRAME, FRAME[["x"]]], axis=1),
        FRAME.assign(x=[1, "a"]),
        FRAME.assign(x=[{1}, [2]]),
        FRAME.rename(columns={"x": 0}).assign(**{"0": 1}),
    ],
    ids=["twice", "mixed", "objects", "same name as text"],
)
def test_columns_of_a_pandas_frame_that_nobody_reads_may_hold_anything(frame: pd.DataFrame) -> None:
    assert read_log(frame).frame["user_id"].to_list() == [1, 2]


def test_a_pandas_column_that_is_read_must_be_unique() -> None:
    with pytest.raises(LogError, match='the frame has several columns "user_id". Rename or remove all but one'):
        read_log(pd.concat([FRAME, FRAME[["user_id"]]], axis=1))
    with pytest.raises(LogError, match='several columns "x"'):
        read_log(pd.concat([FRAME, FRAME[["x"]]], axis=1), columns={"item_id": "x"})
    with pytest.raises(LogError, match="A log must be a path, a polars frame or a pandas frame, not a Series"):
        read_log(FRAME["user_id"])  # type: ignore[arg-type]
