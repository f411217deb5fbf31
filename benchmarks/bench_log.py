"""Time and memory to read, validate and split a Parquet log of 10 million rows.

python benchmarks/bench_log.py [ROWS]       # prints one JSON line: wall and CPU seconds, peak memory in MB
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from freshrec.data.log import read_log
from freshrec.data.split import split_log
from freshrec.data.synthetic import make_world
from freshrec.data.validate import validate_log


def write(file: Path, rows: int) -> None:
    """Write the events of a generated world with the usual column names."""
    log = make_world("drift", users=rows // 20, items=rows // 100, events=rows).log
    log.frame.select("user_id", "item_id", (pl.col("time") // 1_000_000).alias("timestamp")).write_parquet(file)


def measure(file: Path) -> dict[str, float | str]:
    """Read, validate and split `file` in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    log = read_log(file)
    report = validate_log(log)
    spans = split_log(log, by="count", spans=6).spans
    assert sum(len(span.events) for span in spans) == report.rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "benchmark": "log", "rows": report.rows, "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1), "peak_mb": round(peak),
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3:  # in a separate process, so that peak memory excludes the writing of the log
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "log.parquet"
            write(file, int(sys.argv[1]) if len(sys.argv) == 2 else 10_000_000)
            subprocess.run([sys.executable, __file__, "measure", str(file)], check=True)
