"""How often the gate promotes good days and refuses corrupted ones, on the days of real logs.

    python benchmarks/nights.py --data folder-of-the-logs --out benchmarks/results

A nightly job runs over the days of each log. Corrupted copies of a day are judged and discarded. The good day is judged
too, and goes live whatever the verdict, so that a wrong refusal does not affect later days. Writes nights.json: one row
per log and kind of day.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from freshrec.data.log import Log, keep_positives, read_log
from freshrec.nightly.job import NightlyJob
from freshrec.recommender.bundle import new_bundle
from freshrec.store.manifest import Manifest
from freshrec.store.versions import create_store

DAY = 86_400_000_000  # microseconds
Frame = pl.DataFrame


@dataclass(frozen=True)
class Days:
    """A log, and how it is split into days."""

    path: str
    base: float  # share of the rows in the first log, rounded to whole days
    users: int | None = None
    most: int = 100
    hours: float = 24.0


LOGS = {
    "uci": Days("uci_online_retail.parquet", base=0.1, most=240),
    "globo": Days("globo_news_clicks.parquet", base=0.2, users=15_000, most=13),
    "globo, 4 hours": Days("globo_news_clicks.parquet", base=0.2, users=15_000, most=80, hours=4.0),
    "taobao": Days("taobao_userbehavior_head84k.parquet", base=0.25),
    "beauty, weeks": Days("amazon_beauty_5core.parquet", base=0.3, most=100, hours=168.0),
}


def bot(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """One user has 30 % of the rows, on ten items."""
    theirs_E, items = source.random(len(day)) < 0.3, known["item_id"].unique().sample(10, seed=1)
    items_E = items.gather(source.integers(0, 10, len(day)))
    return day.with_columns(
        user_id=pl.when(pl.Series(theirs_E)).then(pl.lit(day["user_id"][0])).otherwise("user_id"),
        item_id=pl.when(pl.Series(theirs_E)).then(items_E).otherwise("item_id"),
    )


def random(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """Every click is on a random known item."""
    items = known["item_id"].unique()
    return day.with_columns(item_id=items.gather(source.integers(0, len(items), len(day))))


def half(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """The second half is missing."""
    return day[: len(day) // 2]


def unit(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """Milliseconds are read as microseconds, so that all times are in 1970."""
    return day.with_columns(pl.col("time") // 1000)


def shifted(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """All times are a year too late."""
    return day.with_columns(pl.col("time") + 365 * DAY)


def equal(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """All times are equal."""
    return day.with_columns(time=pl.lit(day["time"][-1]))


def renamed(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """All items have other ids."""
    return day.with_columns(pl.col("item_id") + 10_000_000)


BAD: tuple[Callable[[Frame, Frame, np.random.Generator], Frame], ...] = (
    bot, random, half, unit, shifted, equal, renamed,
)  # fmt: skip


def cut(days: Days, folder: Path) -> tuple[Frame, list[Frame]]:
    """The first log, and the later days with rows."""
    log = read_log(folder / days.path, users=days.users)
    frame = keep_positives(log).frame.select("user_id", "item_id", "time").unique(maintain_order=True)
    length = int(days.hours / 24 * DAY)
    frame = frame.with_columns(day=(pl.col("time") - frame["time"][0] // DAY * DAY) // length)
    first = frame["day"][round(days.base * len(frame))]
    later = frame.filter(pl.col("day") >= first).partition_by("day", maintain_order=True, include_key=False)
    return frame.filter(pl.col("day") < first).drop("day"), later[: days.most]


def nights(name: str, days: Days, folder: Path, model: str, every: int) -> Iterator[tuple[str, int, Manifest]]:
    """The verdict on each day, good and corrupted: kind, number of the day, version."""
    base, later = cut(days, folder)
    with tempfile.TemporaryDirectory() as where, create_store(Path(where) / "store") as store:
        job = NightlyJob(store)
        job.fit_first_version(Log(base, True, "us"), "base", new_bundle(model, None, 0))
        known = base
        for i, day in enumerate(later):
            for corrupt in BAD if i % every == 0 else ():
                bad = corrupt(day, known, np.random.default_rng(i)).sort("time", maintain_order=True)
                yield corrupt.__name__, i, job.make_challenger(bad)[0]
            job.append_delivery(Log(day, True, "us"), f"day {i}")
            for version in job.catch_up("it is a good day"):
                yield "good", i, version
            known = pl.concat([known, day])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--model", default="item-knn")
    parser.add_argument("--logs", nargs="+", default=list(LOGS), choices=LOGS)
    parser.add_argument("--every", type=int, default=4, help="corrupt every Nth day only")
    arguments = parser.parse_args()
    for name in arguments.logs:
        right: dict[str, list[bool]] = {}
        later: dict[str, list[bool]] = {}  # days with at least seven days before them
        for kind, i, version in nights(name, LOGS[name], arguments.data, arguments.model, arguments.every):
            is_right = version.promoted == (kind == "good")
            right.setdefault(kind, []).append(is_right)
            later.setdefault(kind, []).extend([is_right] * (i >= 7))
            if not is_right:
                print(f"{name} day {i}, {kind}: {version.promoted} {version.reasons}", flush=True)  # noqa: T201
        rows = [
            {
                "log": name, "model": arguments.model, "kind": kind, "days": len(found), "right": sum(found),
                "later": len(later[kind]), "later_right": sum(later[kind]),
            }
            for kind, found in right.items()
        ]  # fmt: skip
        write(arguments.out / "nights.json", name, rows)


def write(out: Path, name: str, rows: list[dict[str, object]]) -> None:
    """Replace the rows of one log, and keep those of the others."""
    rows += [row for row in json.loads(out.read_text())["rows"] if row["log"] != name] if out.exists() else []
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: (str(row["log"]), str(row["kind"]))))
    out.write_text(f'{{"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
