"""Wrote the folders tests/gold/store-0.1.0-* and replay-0.1.0-*: what freshrec 0.1.0, commit 844d548, left on disk.

Never write them again: they stand for the folders that users of 0.1.0 have. To see how they came about, or to write
others of that version elsewhere, check out that commit and run

    ATEN_CPU_CAPABILITY=default python tests/gold/write_stores.py FOLDER

Together they hold every dataclass that a checkpoint of 0.1.0 can hold; known.json names them, with the lists that
0.1.0 made of each store.
"""

import json
import random
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import polars as pl
import torch
from freshrec.cli_replay import _prepare
from freshrec.recipes import cells_of, cut_of, recipe_from, save_recipe, settings_of
from freshrec.replay.replay import Cell
from freshrec.replay.run import _claim, run
from freshrec.serve.guard import Rules
from freshrec.serve.http import Service, app_of
from freshrec.serve.live import Live
from safetensors import safe_open
from starlette.testclient import TestClient

from freshrec.cli import main
from freshrec.replay.measure import facts
from freshrec.replay.results import collect
from freshrec.store.versions import open_store

QUICK = "fit.base_epochs=1:fit.epochs=1"
SMALL = "d=4:negatives=8:batch=16:length=8"
FORCE = ["--force", "--reason", "a tiny day"]

# name of the store -> model, strategy, and the form of its log
STORES = {
    "blend": ("blend:offered=8:length=8:remembered=40:others=6", "refit:fit.max_epochs=1:anew=true", "categories"),
    "popularity": ("popularity", "absorb", "text"),
    "popularity-last": ("popularity-last", "absorb", "numbers"),
    "repeat-last": ("repeat-last", "absorb", "numbers"),
    "item-knn": ("item-knn", "absorb", "no clock"),
    "markov": ("markov", "absorb", "text"),
    "user-knn": ("user-knn", "absorb", "text"),
    "stan": ("stan", "absorb", "text"),
    "mf": (f"mf:{SMALL}", f"sml-n:{QUICK}:transfer.filters=2:transfer.filters2=2:transfer.hidden=4", "text"),
    "mf-biased": (f"mf-biased:{SMALL}", f"sml-linear:{QUICK}", "numbers"),
    "embedding-mlp": (f"embedding-mlp:{SMALL}", f"incctr:{QUICK}", "categories"),
    "pooled": (f"pooled:{SMALL}", f"sml-mlp:{QUICK}:transfer.hidden=4", "numbers"),
    "sasrec": (f"sasrec:{SMALL}", f"ewc:{QUICK}", "categories"),
    "gru4rec": (f"gru4rec:{SMALL}", f"ader:{QUICK}", "text"),
    "stamp": (f"stamp:{SMALL}", f"spmf:{QUICK}", "no clock"),
    "stmp": (f"stmp:{SMALL}", f"frozen:{QUICK}", "numbers"),
    "caser": (f"caser:{SMALL}:horizontal=2", f"rehearsed:{QUICK}:reservoir=20", "numbers"),
    "mind": (f"mind:{SMALL}:k=2", f"imsr:{QUICK}:detect.new=1", "text"),
    "comirec-dr": (f"comirec-dr:{SMALL}:k=2", f"asmg:{QUICK}:h=2", "text"),
    "comirec-sa": (f"comirec-sa:{SMALL}:k=2", f"ader-s:{QUICK}", "numbers"),
    "mind-original": (f"mind-original:{SMALL}:k=2", f"finetune:{QUICK}", "numbers"),
    "comirec-sa-original": (f"comirec-sa-original:{SMALL}:k=2", f"full:{QUICK}", "numbers"),
    "limarec": (f"limarec:{SMALL}", f"asmg-linear:{QUICK}:k=2", "text"),
    "mimn": (f"mimn:{SMALL}:k=2:slot=4:units=4", f"finetune-span:{QUICK}", "numbers"),
}
HOUR = 3600
FIRST = 1_750_000_000  # seconds since 1970
USERS, ITEMS = 14, 12


def rows_of(form: str, n: int, since: int, users: range, items: range, seed: int) -> list[tuple[str, ...]]:
    """Rows of a CSV file: an hour apart, each user prefers items of its own third of the catalog."""
    source = random.Random(seed)
    mark = "" if form == "numbers" else "u", "" if form == "numbers" else "i"
    rows = []
    for nth in range(n):
        user = source.choice(users)
        own = [item for item in items if item % 3 == user % 3]
        item = source.choice(own if source.random() < 0.8 else items)
        time = str((since + nth) // 10) if form == "no clock" else str(FIRST + HOUR * (since + nth))
        rows.append((f"{mark[0]}{user}", f"{mark[1]}{item}", time, f"kind{item % 3}"))
    return rows


def write_csv(rows: list[tuple[str, ...]], form: str, path: Path) -> None:
    """The rows as a file that `freshrec fit` reads."""
    names = ["user_id", "item_id", "period" if form == "no clock" else "timestamp", "category"]
    n = 4 if form == "categories" else 3
    path.write_text("".join(",".join(row[:n]) + "\n" for row in [tuple(names), *rows]))


def told(*words: str) -> str:
    """What a command prints."""
    with redirect_stdout(StringIO()) as said:
        code = main([*words])
    assert code in (0, 8), (code, words)  # 8: the gate refused, which one store is for
    return said.getvalue()


def write_store(name: str, folder: Path, aside: Path) -> None:
    """A store of 120 events and two days of 20, in which a user and an item are new."""
    model, strategy, form = STORES[name]
    at = ["--store", str(folder)]
    days = [
        rows_of(form, 120, 0, range(1, USERS), range(1, ITEMS), 1),
        rows_of(form, 20, 120, range(1, USERS + 1), range(1, ITEMS + 1), 2),
    ]
    for nth, rows in enumerate(days):
        write_csv(rows, form, aside / f"{nth}.csv")
    told("fit", str(aside / "0.csv"), *at, "--model", model, "--strategy", strategy)
    told("update", str(aside / "1.csv"), *at, *FORCE)
    if name == "comirec-dr":  # ASMG keeps spans from the second update on
        write_csv(rows_of(form, 20, 140, range(1, USERS), range(1, ITEMS), 3), form, aside / "2.csv")
        told("update", str(aside / "2.csv"), *at, *FORCE)
    if name == "blend":
        more_of_blend(folder, aside, at)


def more_of_blend(folder: Path, aside: Path, at: list[str]) -> None:
    """A refused version, a day with late and doubled rows, and clicks: learnt ones, and one that waits."""
    late = rows_of("categories", 3, 100, range(1, USERS), range(1, ITEMS), 3)
    late = [(user, item, str(int(time) + 60), kind) for user, item, time, kind in late]
    new = rows_of("categories", 17, 140, range(1, USERS), range(1, ITEMS), 4)
    odd = [
        ("u1", item, time, kind) for _, item, time, kind in rows_of("categories", 60, 160, range(1, 2), range(1, 12), 5)
    ]
    write_csv(odd, "categories", aside / "odd.csv")
    told("update", str(aside / "odd.csv"), *at, "--gate", "one_user=0.01:few_rows=1")
    click(folder, [("u2", "i5", "first", FIRST + HOUR * 155), ("u-new", "i3", "second", FIRST + HOUR * 400)])
    write_csv([*late, *new, *new[:2]], "categories", aside / "late.csv")
    told("update", str(aside / "late.csv"), *at, *FORCE)
    click(folder, [("u3", "i6", "third", FIRST + HOUR * 401)])


def click(folder: Path, clicks: list[tuple[str, str, str, int]]) -> None:
    """Clicks that a server of the store takes."""
    live = Live(open_store(folder), lambda line: None)
    live.begin()
    with TestClient(app_of(Service(live, Rules(rate=0), lambda user: {}))) as client:
        names = ("user_id", "item_id", "event_id", "timestamp")
        events = [dict(zip(names, one)) for one in clicks]
        answer = client.post("/events", json={"events": events})
        assert answer.status_code == 200, answer.text
    live.end()


def lists_of(folder: Path, form: str) -> dict[str, list[tuple[str, float]]]:
    """user -> item and score, the best first, of two known users and a stranger."""
    users = ["1", "2", "99"] if form == "numbers" else ["u1", "u2", "u99"]
    found: dict[str, list[tuple[str, float]]] = {}
    for row in json.loads(told("recommend", *users, "-k", "5", "--store", str(folder), "--json")):
        found.setdefault(str(row["user_id"]), []).append((str(row["item_id"]), row["score"]))
    return found


RECIPE = {
    "log": {"path": "log.csv"},
    "spans": {"by": "count", "spans": 4, "forget_users": 0.0},
    "replay": {
        "models": ["blend:offered=8:length=8:remembered=40:others=6", f"sasrec:{SMALL}:categories=3"],
        "strategies": ["refit:fit.max_epochs=1", f"finetune:{QUICK}", f"ader:{QUICK}"],
        "also": [f"comirec-dr:{SMALL}:k=2/imsr:{QUICK}:detect.new=1", f"mf:{SMALL}/spmf:{QUICK}"],
        "controls": ["popularity", "item-knn"],
        "tune": True,
        "metrics": ["hr@5", "ndcg@5"],
    },
}
CLICKS = {
    "log": {"path": "log.csv", "exposures": True},
    "spans": {"by": "count", "spans": 4, "forget_users": 0.0},
    "replay": {
        "models": [f"embedding-mlp:{SMALL}"],
        "strategies": [f"incctr:{QUICK}", f"finetune:{QUICK}"],
        "metrics": ["auc", "logloss"],
    },
}
HALF = 2  # the last span before the interruption


class Stop(Exception):
    """The interruption."""


def stop(cell: Cell, span: int) -> None:
    """Ends a run where the state of the half-finished cell is on disk."""
    if span == HALF and cell.model != "popularity":
        raise Stop


def write_replay(recipe_of: dict[str, dict[str, object]], folder: Path, aside: Path) -> dict[str, dict[str, float]]:
    """A replay stopped after span 2 of 4; the averages of one that was not, by cell and metric."""
    recipe = recipe_from(recipe_of | {"log": recipe_of["log"] | {"folder": str(folder)}})
    folder.mkdir()
    labels = bool(recipe_of["log"].get("exposures"))
    rows = rows_of("text", 300, 0, range(1, USERS), range(1, ITEMS), 6)
    source = random.Random(7)
    head = "user_id,item_id,timestamp,category" + (",label" if labels else "")
    lines = [",".join(row) + (f",{int(source.random() < 0.5)}" if labels else "") for row in rows]
    (folder / "log.csv").write_text("\n".join([head, *lines]) + "\n")
    cells, cut, settings = cells_of(recipe), cut_of(recipe), settings_of(recipe)
    for out in (folder, aside / folder.name):
        _prepare(out, recipe, False)
        _claim(out, cells, cut, settings)
        for cell in cells:
            if out == folder and cell.strategy.startswith("finetune"):  # its base block is there
                continue
            try:
                run([cell], cut, settings, out, tell=stop if out == folder else lambda cell, span: None)
            except Stop:
                continue
    part = recipe.replay
    about, equal = (None, "targets") if labels else (facts(cut.spans), "users")
    results = collect(cells, about, part.metrics, aside / folder.name, equal)
    save_recipe(recipe_from(recipe_of), folder / "recipe.toml")
    wanted = (pl.col("span") == -1) & (pl.col("slice") == "all") & pl.col("metric").is_in(part.metrics)
    found: dict[str, dict[str, float]] = {}
    for model, strategy, metric, value in results.filter(wanted).select("model", "strategy", "metric", "value").rows():
        found.setdefault(f"{model}/{strategy}", {})[metric] = value
    return found


def classes_in(path: Path) -> set[str]:
    """The names of the dataclasses that a file holds."""
    found: set[str] = set()

    def look(node: object) -> None:
        if isinstance(node, dict):
            if node.keys() == {"class", "fields"}:
                found.add(node["class"])
            for child in node.values():
                look(child)
        elif isinstance(node, list):
            for child in node:
                look(child)

    with safe_open(path, framework="pt") as file:
        look(json.loads(file.metadata()["freshrec"])["state"])
    return found


if __name__ == "__main__":
    gold, aside = Path(sys.argv[1]), Path(sys.argv[1]) / "aside"
    torch.set_num_threads(1)
    known: dict[str, object] = {"machine": f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"}
    for name, (*_, form) in STORES.items():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        folder = gold / f"store-0.1.0-{name}"
        write_store(name, folder, aside)
        classes = set[str]().union(*(classes_in(path) for path in folder.rglob("*.safetensors")))
        (folder / "lock").unlink()
        known[folder.name] = {"form": form, "lists": lists_of(folder, form), "classes": sorted(classes)}
    for name, recipe_of in {"replay-0.1.0": RECIPE, "replay-0.1.0-clicks": CLICKS}.items():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        folder = gold / name
        averages = write_replay(recipe_of, folder, aside)
        for lock in folder.glob("bases/*.lock"):
            lock.unlink()
        classes = set[str]().union(*(classes_in(path) for path in folder.rglob("*.safetensors")))
        known[folder.name] = {"averages": averages, "classes": sorted(classes)}
    shutil.rmtree(aside)
    (gold / "known-0.1.0.json").write_text(json.dumps(known, indent=1) + "\n")
