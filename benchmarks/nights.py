"""How often the gate promotes good days and refuses corrupted ones, and what becomes of them afterwards.

    python benchmarks/nights.py verdicts --data folder-of-the-logs
    python benchmarks/nights.py obeyed --data folder-of-the-logs

`verdicts` runs a nightly job over the days of each log. Corrupted copies of a day are judged and discarded. The good
day is judged too, and goes live whatever the verdict, so that a wrong refusal does not affect later days.

`obeyed` runs many stores over resampled days, and obeys every verdict. Nobody retries or forces anything. Each store
starts at a random day and passes through the next 60 days of a log in order. Each day has a sample of its users: as
many draws with replacement as it has users, each user counted once, which leaves about 63 %. One night in twenty brings
a corrupted copy instead of the day. The second run of each store has a gate that neither defers nor accepts anything,
as in 0.1.0.

Both write nights.json. `obeyed` can be resumed: finished stores are not run again.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from freshrec.data.log import Log, keep_positives, read_log
from freshrec.nightly.deferral import batches_of, find_deferral
from freshrec.nightly.gate import GateLimits, Verdict
from freshrec.nightly.job import NightlyJob
from freshrec.recommender.bundle import new_bundle
from freshrec.store.manifest import Manifest
from freshrec.store.versions import create_store, version_chain

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


def users(day: Frame, known: Frame, source: np.random.Generator) -> Frame:
    """All users have other ids."""
    return day.with_columns(pl.col("user_id") + 100_000_000)


BAD: tuple[Callable[[Frame, Frame, np.random.Generator], Frame], ...] = (
    bot, random, half, unit, shifted, equal, renamed, users,
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


def nights(
    name: str, days: Days, folder: Path, model: str, every: int
) -> Iterator[tuple[str, int, Verdict | Manifest]]:
    """The verdict on each day, good and corrupted: kind, number of the day, verdict or version."""
    base, later = cut(days, folder)
    with tempfile.TemporaryDirectory() as where, create_store(Path(where) / "store") as store:
        job = NightlyJob(store)
        job.fit_first_version(Log(base, True, "us"), "base", new_bundle(model, None, 0))
        known = base
        for i, day in enumerate(later):
            for corrupt in BAD if i % every == 0 else ():
                bad = corrupt(day, known, np.random.default_rng(i)).sort("time", maintain_order=True)
                champion = job.champion()
                yield corrupt.__name__, i, champion.challenge(bad, champion.delivery_stats(bad)).verdict
            job.append_delivery(Log(day, True, "us"), f"day {i}")
            for version in job.catch_up("it is a good day"):
                yield "good", i, version
            known = pl.concat([known, day])


app = typer.Typer(help=__doc__, add_completion=False)
DataOption = Annotated[Path, typer.Option(help="The folder of the logs.")]
OutOption = Annotated[Path, typer.Option(help="The folder of nights.json.")]
RESULTS = Path("benchmarks/results")


@app.command()
def verdicts(
    data: DataOption,
    out: OutOption = RESULTS,
    model: str = "item-knn",
    log: Annotated[list[str] | None, typer.Option(help="A log; several times for several. Default: all.")] = None,
    every: int = 4,
) -> None:
    """Judge good days and corrupted copies of every Nth day."""
    for name in log or LOGS:
        right: dict[str, list[bool]] = {}
        later: dict[str, list[bool]] = {}  # days with at least seven days before them
        for kind, i, verdict in nights(name, LOGS[name], data, model, every):
            is_right = verdict.promoted == (kind == "good")
            right.setdefault(kind, []).append(is_right)
            later.setdefault(kind, []).extend([is_right] * (i >= 7))
            if not is_right:
                typer.echo(f"{name} day {i}, {kind}: {verdict.promoted} {verdict.reasons}")
        rows = [
            {
                "log": name, "model": model, "kind": kind, "days": len(found), "right": sum(found),
                "later": len(later[kind]), "later_right": sum(later[kind]),
            }
            for kind, found in right.items()
        ]  # fmt: skip
        others = [row for row in read(out, "rows") if row["log"] != name]
        write(out, "rows", sorted([*others, *rows], key=lambda row: (row["log"], row["kind"])))


MODEL, STRATEGY = "pooled:d=16", "finetune:fit.base_epochs=3:fit.epochs=2"  # its quality varies from night to night
CORRUPTED_SHARE = 0.05  # share of the nights with a corrupted day
OLD_GATE = GateLimits(max_spoiled_updates=0, max_refused_in_a_row=10**9, min_past=inf, separate=False)  # as in 0.1.0
KINDS = ("good", *(corrupt.__name__ for corrupt in BAD))
OBEYED_LOGS = {  # the first log of each store has a random share of the rows, from `base` to 0.2 more
    "uci": Days("uci_online_retail.parquet", base=0.1, most=60),
    "globo, 4 hours": Days("globo_news_clicks.parquet", base=0.1, users=6_000, most=60, hours=4.0),
    "taobao, 4 hours": Days("taobao_userbehavior_head84k.parquet", base=0.1, most=60, hours=4.0),
    "beauty, weeks": Days("amazon_beauty_5core.parquet", base=0.1, most=60, hours=168.0),
}


def resampled(later: list[Frame], source: np.random.Generator) -> Iterator[Frame]:
    """Yield each day with a part of its users, drawn with replacement and counted once."""
    for day in later:
        ids = day["user_id"].unique(maintain_order=True)
        drawn = ids.gather(source.integers(0, len(ids), len(ids))).unique()
        yield day.filter(pl.col("user_id").is_in(drawn.implode()))


@dataclass
class Night:
    """What was delivered in a night, and what became of it."""

    kind: str
    batch: int  # of the delivery
    first_batch: int  # of the rows of the first suspicious user, or of the delivery
    n_rows: int
    n_separate: int  # rows of suspicious users, which became batches of their own
    is_refused: bool

    def fate(self, learned: set[int], waiting: set[int]) -> str:
        """Whether the live version has learned the delivery; for a bot: the rows of the bot."""
        is_bot = self.kind == "bot" and self.n_separate
        batch = self.first_batch if is_bot else self.batch
        return "learned" if batch in learned else "waiting" if batch in waiting else "lost"


def obey(name: str, number: int, data: Path, limits: GateLimits) -> dict[str, Any]:
    """Run one store over its nights, and count what became of the good and the corrupted days."""
    source = np.random.default_rng([number, list(OBEYED_LOGS).index(name)])
    days = OBEYED_LOGS[name]
    base, later = cut(replace(days, base=days.base + 0.2 * source.random()), data)
    found, known = list[Night](), base
    with tempfile.TemporaryDirectory() as where, create_store(Path(where) / "store") as store:
        job = NightlyJob(store, limits)
        job.fit_first_version(Log(base, True, "us"), "base", new_bundle(MODEL, STRATEGY, number))
        for i, day in enumerate(resampled(later, source)):
            kind = "good"
            if source.random() < CORRUPTED_SHARE:
                corrupt = BAD[int(source.integers(0, len(BAD)))]
                day, kind = corrupt(day, known, source).sort("time", maintain_order=True), corrupt.__name__
            result = job.append_delivery(Log(day, True, "us"), f"night {i}")
            versions = list(job.catch_up())
            refused = [version for version in versions if not version.promoted]
            if result.batch is not None:
                first = versions[0].batch or result.batch
                found.append(Night(kind, result.batch, first, result.n_appended, result.n_separate, bool(refused)))
            for version in refused:
                typer.echo(f"{name} {number} night {i}, {kind}: {version.reasons}", err=True)
            known = pl.concat([known, day]) if kind == "good" else known
        learned = set(batches_of(version_chain(store)))
        deferral = find_deferral(store, limits)
        waiting = set(batches_of([*deferral.versions, *deferral.pending]))
    row = {"log": name, "store": number, "gate": "0.1.0" if limits is OLD_GATE else "now", "nights": len(found)}
    return row | {"kinds": {kind: _count([n for n in found if n.kind == kind], learned, waiting) for kind in KINDS}}


def _count(nights: list[Night], learned: set[int], waiting: set[int]) -> dict[str, int]:
    fates = [night.fate(learned, waiting) for night in nights]
    return {
        "nights": len(nights),
        "refused": sum(night.is_refused for night in nights),
        **{fate: fates.count(fate) for fate in ("learned", "waiting", "lost")},
        "rows": sum(night.n_rows + night.n_separate for night in nights),
        "separate_rows": sum(night.n_separate for night in nights if night.first_batch not in learned),
    }


@app.command()
def obeyed(
    data: DataOption,
    out: OutOption = RESULTS,
    stores: Annotated[int, typer.Option(help="Stores of each log.")] = 46,
    first: Annotated[int, typer.Option(help="Number of the first store, to share the work.")] = 0,
    old: Annotated[int, typer.Option(help="Stores of each log that also run with the gate of 0.1.0.")] = 46,
) -> None:
    """Run stores over resampled nights with all verdicts obeyed."""
    for gate, limits, n_stores in (("now", GateLimits(), stores), ("0.1.0", OLD_GATE, old)):
        for number in range(first, n_stores):
            for name in OBEYED_LOGS:
                if any((row["log"], row["store"], row["gate"]) == (name, number, gate) for row in read(out, "stores")):
                    continue
                write(out, "stores", [*read(out, "stores"), obey(name, number, data, limits)])


def read(out: Path, part: str) -> list[dict[str, Any]]:
    """Return the rows of one part of nights.json."""
    file = out / "nights.json"
    found: list[dict[str, Any]] = json.loads(file.read_text()).get(part, []) if file.exists() else []
    return found


def write(out: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of one part of nights.json."""
    parts = {name: read(out, name) for name in ("rows", "stores")} | {part: rows}
    lines = {name: ",\n".join(json.dumps(row) for row in of_part) for name, of_part in parts.items()}
    out.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(f'"{name}": [\n{of_part}\n]' for name, of_part in lines.items())
    (out / "nights.json").write_text(f"{{{text}}}\n")


if __name__ == "__main__":
    app()
