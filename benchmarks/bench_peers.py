"""Comparison with other libraries: same log, same split, same full ranking, same machine, one after the other.

`python benchmarks/bench_peers.py --data FOLDER` writes benchmarks/results/peers.json, the source of a table of
docs/results.md. Without --data it does nothing. Each library is installed into its own environment (pip, torch as in
constraints.txt). peers/protocol.py defines the task. One thread; training time is in CPU seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer

from freshrec.data.log import read_log

HERE = Path(__file__).resolve().parent
OURS = "freshrec"
PEERS = {
    "recbole": ["recbole==1.2.1", "numpy<2", "pandas<3"],  # it uses names that numpy 2 removed
    "rechub": ["torch-rechub==0.9.0"],
    "implicit": ["implicit==0.7.3"],
}
AS_RECBOLE = "blocks=2:heads=2:dropout=0.5:lr=0.001:batch=256:predict=last:loss=full"
PAIRS = (  # our model, the other library, its model of the same method
    ("sasrec", "recbole", "SASRec"),
    (f"sasrec:{AS_RECBOLE}", "recbole", "SASRec"),
    ("gru4rec", "recbole", "GRU4Rec"),
    ("mind-original", "rechub", "mind"),
    ("comirec-dr-original:transform=interest", "rechub", "comirec-dr"),
    ("comirec-sa-original", "rechub", "comirec-sa"),
    ("mf", "implicit", "bpr"),
    ("mf", "implicit", "als"),
    ("item-knn", "implicit", "item-knn"),
)
DRAWS = 2000


def bench(
    data: Annotated[str, typer.Option(help="The folder of the logs.")] = "",
    log: str = "amazon_grocery_5core",
    users: int = 600,
    limit: Annotated[float, typer.Option(help="Limit of training time per model, in CPU seconds.")] = 120.0,
    environments: Annotated[Path, typer.Option(help="Folder for the environments of the libraries.")] = Path(
        "runs/peers"
    ),
    only: Annotated[str, typer.Option(help="Libraries to run, separated by commas; all by default.")] = "",
) -> None:
    """Make the environments, run all pairs without a result in the folder, and write the JSON."""
    if not data:
        print(json.dumps({"benchmark": "peers", "skipped": "needs --data, the folder of the logs"}))
        return
    environments.mkdir(parents=True, exist_ok=True)
    part = environments / f"{log}-{users}-{limit:g}"
    part.mkdir(exist_ok=True)
    about = _split(Path(data) / f"{log}.parquet", users, part / "data.npz")
    rows, failed = [], {}
    for ours, library, theirs in PAIRS:
        if only and library not in only.split(","):
            continue
        try:
            peer = _run(_python(library, environments), f"peer_{library}.py", part, theirs, limit)
        except subprocess.CalledProcessError as problem:
            failed[library] = f"exit code {problem.returncode}"
            continue
        mine = _run(sys.executable, "ours.py", part, ours, limit)
        rows.append({"ours": ours, "library": PEERS[library][0], "theirs": theirs} | _compared(mine, peer))
    found = {"log": log, "users": users, "limit_s": limit, **about, "failed": failed, "rows": rows}
    (HERE / "results" / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"benchmark": "peers", "rows": len(rows), "failed": failed}))


def _split(path: Path, users: int, out: Path) -> dict[str, int]:
    """Write the events of users with at least four events, sorted by user and time, as integers."""
    frame = read_log(path, users=users).frame.select("user_id", "item_id", "time")
    kept = frame.filter(pl.len().over("user_id") >= 4)
    kept = kept.sort("user_id", "time", maintain_order=True)
    items = kept["item_id"].rank("dense").to_numpy().astype(np.int64)
    sizes = kept.group_by("user_id", maintain_order=True).len()["len"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    np.savez(out, offsets=offsets, items=items, n_items=items.max())
    return {"tested": len(sizes), "items": int(items.max()), "events": len(items)}


def _python(library: str, environments: Path) -> str:
    """Path of the Python in the library's environment, which is made if it does not exist."""
    folder = (environments / library).absolute()
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pinned = [line for line in (HERE.parent / "constraints.txt").read_text().split() if line.startswith("torch==")]
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pinned) + "\n")
        pip = [folder / "bin/pip", "install", "-q", "-c", constraints, *PEERS[library]]
        subprocess.run(pip, check=True)
        (folder / "made").touch()
    return str(folder / "bin/python")


def _run(python: str, script: str, part: Path, model: str, limit: float) -> dict[str, Any]:
    """The report of a script about a model. An existing report is not computed again."""
    out = part / f"{script.removesuffix('.py')}-{model.replace(':', '_')}.json"
    if not out.exists():
        command = [python, HERE / "peers" / script, "data.npz", model, str(limit), out.name]
        subprocess.run(
            command, check=True, cwd=part, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )  # some libraries leave files
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _compared(mine: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Values of both sides, and the 95 % bootstrap interval over users of their difference, for each metric."""
    source = np.random.default_rng(0)
    row: dict[str, Any] = {}
    sides = {"ours": np.array(mine["ranks"]), "theirs": np.array(peer["ranks"])}
    drawn = source.integers(0, len(sides["ours"]), (DRAWS, len(sides["ours"])))
    for metric in ("recall@20", "ndcg@20"):
        values = {side: (r <= 20) / (np.log2(1 + r) if metric == "ndcg@20" else 1.0) for side, r in sides.items()}
        difference = values["ours"] - values["theirs"]
        low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
        row[metric] = [float(values["ours"].mean()), float(values["theirs"].mean()), float(low), float(high)]
    for cost in ("cpu_s", "epochs", "cpu_s_in_all", "limited"):
        row[cost] = [mine[cost], peer[cost]]
    return row


if __name__ == "__main__":
    typer.run(bench)
