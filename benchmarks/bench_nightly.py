"""Cost of a nightly update with 100,000 events on a store with 100,000 users and items.

Prints one JSON line: seconds of each part and peak memory. `outside` is the share of the time that is not learning:
reading, the event log, the gate and saving.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from freshrec.data.log import read_log
from freshrec.nightly.job import NightlyJob, hash_source
from freshrec.recommender.bundle import new_bundle, read_bundle
from freshrec.store.versions import create_store, open_store

DAY = 86_400_000_000  # microseconds


def events(n: int, users: int, items: int, start: int, seed: int) -> pl.DataFrame:
    """A day of clicks. Users and items have long tails; each user stays in one part of the catalog."""
    source = np.random.default_rng(seed)
    users_E = (users * source.random(n) ** 1.5).astype(np.int64)
    items_E = (users_E * 7919 + (items * source.random(n) ** 4).astype(np.int64)) % items
    times_E = start + np.sort(source.integers(0, DAY, n))
    return pl.DataFrame({"user_id": users_E, "item_id": items_E, "timestamp": times_E})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--base", type=int, default=500_000)
    parser.add_argument("--new", type=int, default=100_000)
    parser.add_argument("--model", default="blend")
    parser.add_argument("--strategy", default="refit:max_passes=1000000")
    arguments = parser.parse_args()
    sizes = arguments.users, arguments.items
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"day-{i}.parquet" for i in range(3)]
        events(arguments.base, *sizes, 1_750_000_000_000_000, 0).write_parquet(paths[0])
        for i in (1, 2):
            events(arguments.new, *sizes, 1_750_000_000_000_000 + i * DAY, i).write_parquet(paths[i])
        since = time.perf_counter()
        with create_store(Path(folder) / "store") as store:
            contents = new_bundle(arguments.model, arguments.strategy, 0)
            first = NightlyJob(store).fit_first_version(read_log(paths[0]), hash_source(paths[0]), contents)
        found = {"benchmark": "nightly", "model": arguments.model, **first.sizes, "fit_s": time.perf_counter() - since}
        for path in paths[1:]:  # the second is the one to read: the first update has no older events to test
            parts, since = {}, time.perf_counter()
            job = NightlyJob(open_store(Path(folder) / "store"))
            with job.store.locked():
                begin = time.perf_counter()
                _ = job.bundle
                parts["open_s"] = time.perf_counter() - begin
                begin = time.perf_counter()
                taken = job.append_delivery(read_log(path), hash_source(path))
                parts["log_s"] = time.perf_counter() - begin
                [version] = job.catch_up()
            total = time.perf_counter() - since
        parts["learn_s"] = version.numbers["update_s"]
        parts["gate_s"] = version.numbers["wait_s"] - version.numbers["update_s"]
        parts["save_s"] = total - sum(parts.values())
        since = time.perf_counter()
        read_bundle(job.store.verified_files(version.id))
        n_bytes = sum(file.n_bytes for file in version.files.values())
        found |= {"new": taken.n_appended, "total_s": total, **parts, "outside": 1 - parts["learn_s"] / total}
        found |= {"load_s": time.perf_counter() - since, "mb": n_bytes / 2**20, "verdict": version.promoted}
        found |= {name: value for name, value in version.numbers.items() if name.endswith("_cpu_s")}
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    print(json.dumps(rounded), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
