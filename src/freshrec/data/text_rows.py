"""Rows of CSV and TSV files: a row is one line with as many fields as the header. Empty lines are no rows.

Only a field between quotation marks may hold line breaks. The lines are checked before the file is parsed, because a
parser takes everything between two stray quotation marks as one field.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from freshrec.data.text_faults import check_text_file, describe_bad_record, not_utf8_error
from freshrec.errors import LogError, OptionError
from freshrec.text_layout import to_printable

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|", "space": " "}
LINE, INDEX = "line", "index"
NONE = pl.Series(INDEX, [], dtype=pl.UInt32)
NUMBER_OR_TIME = r"^[0-9][0-9T:.Z+ -]*$"  # a field of one


def parse_separator(text: str) -> str:
    """Return the separator that a user typed: one character or a name, such as tab. Raises OptionError for others."""
    found = SEPARATORS.get(text, "\t" if text == "\\t" else text)
    if len(found.encode()) != 1 or found.isalnum() or found in '"\r\n':
        raise OptionError(
            f'--separator is "{to_printable(text, 40)}", which is no separator. Use one character, or '
            f"{', '.join(SEPARATORS)}."
        )
    return found


def scan_text(path: Path, separator: str = ",", names: Sequence[str] | None = None) -> pl.LazyFrame:
    """Scan a text file with all columns as text. `names` are the columns of a file without a header.

    Types that are inferred from the first rows may fail later, or turn the id 007 into 7. Raises LogError for a line
    with too few or too many fields, and for stray quotation marks.
    """
    check_text_file(path)
    lines = _Lines(path, separator, names)
    try:
        quote_char, blank_rows = lines.check()
    except pl.exceptions.ComputeError as problem:
        raise (not_utf8_error(path) or problem) from None
    rows = lines.scan_fields(quote_char)
    if not len(blank_rows):
        return rows
    return rows.with_row_index(INDEX).filter(~pl.col(INDEX).is_in(blank_rows.implode())).drop(INDEX)


@dataclass(frozen=True)
class _Lines:
    """The lines of a text file, and what a line must look like."""

    path: Path
    separator: str
    names: Sequence[str] | None

    def scan_fields(self, quote_char: str | None) -> pl.LazyFrame:
        has_header = self.names is None
        return pl.scan_csv(
            self.path,
            separator=self.separator,
            has_header=has_header,
            new_columns=self.names,
            quote_char=quote_char,
            infer_schema=False,
            glob=False,
        )

    def check(self) -> tuple[str | None, pl.Series]:
        """Return the quotation mark, None if it is an ordinary character, and the numbers of the blank rows.

        Raises LogError for a bad line, with its number.
        """
        lines = pl.scan_lines(self.path, name=LINE, row_index_name=INDEX, glob=False)
        header = self._header(lines)
        line, n_separators = pl.col(LINE), len(header) - 1
        is_blank, has_quote = line.str.len_bytes() == 0, line.str.contains('"', literal=True)
        is_full = line.str.count_matches(self.separator, literal=True) == n_separators
        n_blank, n_wrong, n_quoted = (
            lines.select(is_blank.sum(), wrong=(~is_blank & ~is_full).sum(), quoted=has_quote.sum())
            .collect(engine="streaming")
            .row(0)
        )
        unfit = lines.filter(~is_blank & (~is_full | has_quote))
        if n_quoted:
            unfit = unfit.filter(~line.str.contains(record_pattern(self.separator, len(header))))
            n_unfit = unfit.select(pl.len()).collect(engine="streaming").item()
        else:
            n_unfit = n_wrong
        blank = lines.filter(is_blank).select(INDEX).collect(engine="streaming")[INDEX] if n_blank else NONE
        if not n_quoted and n_wrong:
            first = unfit.head(1).collect()
            raise self._error(header, first[LINE][0], first[INDEX][0])
        if not n_unfit or (self.separator == "\t" and not n_wrong):
            return '"' if n_quoted and not n_unfit else None, self._row_numbers(blank, blank)
        stats = lines.select(INDEX, odd=line.str.count_matches('"', literal=True) % 2, full=is_full)
        records = self._check_records(header, lines, unfit, stats.collect(engine="streaming"))
        alone = records.filter(pl.col("n_lines") == 1, pl.col(INDEX).is_in(blank.implode())) if n_blank else records[:0]
        return '"', self._row_numbers(alone["record"], blank)

    def _header(self, lines: pl.LazyFrame) -> list[str]:
        """Return the column names. Raises LogError if another separator divides the header."""
        if self.names is not None:
            return list(self.names)
        first = lines.filter(pl.col(LINE).str.len_bytes() > 0).head(1).collect()[LINE]
        if not len(first):
            raise LogError(f"{self.path.name} has no header. Its first line must name the columns.")
        if "\0" in first[0]:
            raise LogError(f"{self.path.name} has zero bytes in its header, as UTF-16 has. Save it as UTF-8.")
        if "\r" in first[0]:
            raise LogError(f"{self.path.name} has lines that end in CR alone. Save it with LF or CR LF line ends.")
        names = self.scan_fields('"').collect_schema().names() if '"' in first[0] else first[0].split(self.separator)
        if len(names) > 1:
            return names
        for word, separator in SEPARATORS.items():
            if separator in first[0]:
                raise LogError(
                    f"{self.path.name} has one column, {to_printable(first[0], 60)}. Pass --separator {word}."
                )
        return names

    def _row_numbers(self, records: pl.Series, blank: pl.Series) -> pl.Series:
        """Turn numbers of blank records into numbers of rows. The parser skips blank lines before the header itself."""
        n_leading = int((blank == pl.int_range(len(blank), eager=True)).sum()) if len(blank) else 0
        records = records.filter(records >= n_leading)
        return records.cast(pl.Int64) - n_leading - (1 if self.names is None else 0)

    def _check_records(
        self, header: list[str], lines: pl.LazyFrame, unfit: pl.LazyFrame, stats: pl.DataFrame
    ) -> pl.DataFrame:
        """Join lines whose quotation marks belong together to records, and check them.

        `stats` has a row per line: `odd`, whether its number of quotation marks is odd, and `full`, whether it has all
        fields on its own. Returns record, index (the first line) and n_lines.
        """
        inside = (stats["odd"].cum_sum() - stats["odd"]) % 2 == 1
        stats = stats.with_columns(record=(~inside).cast(pl.UInt32).cum_sum() - 1)
        records = stats.group_by("record", maintain_order=True).agg(
            pl.col(INDEX).first(), n_lines=pl.len(), full=pl.col("full").first() & pl.col("full").last()
        )
        long = records.filter(pl.col("n_lines") > 1)["record"]
        members = stats.filter(pl.col("record").is_in(long.implode()))[INDEX]
        needed = pl.concat([members, unfit.select(INDEX).collect(engine="streaming")[INDEX]]).unique()
        texts = lines.filter(pl.col(INDEX).is_in(needed.implode())).collect(engine="streaming")
        joined = (
            texts.join(stats.select(INDEX, "record"), on=INDEX, maintain_order="left")
            .group_by("record", maintain_order=True)
            .agg(pl.col(LINE).str.join("\n"), first=pl.col(LINE).first(), last=pl.col(LINE).last())
            .join(records, on="record", maintain_order="left")
        )
        is_right = pl.col(LINE).str.contains(record_pattern(self.separator, len(header)))
        is_swallowed = (pl.col("n_lines") > 1) & pl.col("full") & self._have_common_place(len(header))
        bad = joined.filter(~is_right | is_swallowed)
        if len(bad):
            raise self._error(header, bad[LINE][0], bad[INDEX][0])
        return records

    def _have_common_place(self, n_fields: int) -> pl.Expr:
        """Whether `first` and `last`, lines of a record, have a number or a time in the same field, or none at all."""
        first, last = (pl.col(name).str.split(self.separator) for name in ("first", "last"))
        in_first, in_last = (
            [fields.list.get(place, null_on_oob=True).str.contains(NUMBER_OR_TIME) for place in range(n_fields)]
            for fields in (first, last)
        )
        return pl.any_horizontal(a & b for a, b in zip(in_first, in_last)) | ~pl.any_horizontal(*in_first, *in_last)

    def _error(self, header: list[str], text: str, index: int) -> LogError:
        return LogError(f"{self.path.name}: {describe_bad_record(text, index + 1, self.separator, header)}")


def record_pattern(separator: str, n_fields: int) -> str:
    """Return the pattern of a record in which fields stand between quotation marks or hold none."""
    mark = re.escape(separator)
    field = rf'(?:"(?:[^"]|"")*"|[^"\n{mark}]*)'
    return rf"^\x{{feff}}?{field}(?:{mark}{field}){{{n_fields - 1}}}$"
