"""What tests/test_nightly.py kills: it changes the store in a folder for ever."""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from freshrec.cli.app import main

# A new process starts as a copy of one that has imported these, which takes seconds.
PRELOADED = ["freshrec.nightly.job", "freshrec.recommender.recommender", "freshrec.cli.app", "hypothesis", "pytest"]


def start(folder: Path, deeds: str) -> BaseProcess:
    """Start the process; it is ready when this returns."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    ready, says_ready = processes.Pipe(duplex=False)
    process = processes.Process(target=change_for_ever, args=(folder, deeds.split(","), says_ready))
    process.start()
    says_ready.close()
    with ready:
        assert ready.recv() == "ready"
    return process


def change_for_ever(folder: Path, deeds: list[str], says_ready: Connection) -> None:
    source, at = np.random.default_rng(), ["--store", str(folder / "s")]
    arguments = {
        "update": lambda: [str(folder / f"day-{source.integers(6)}.parquet"), "--force", "--reason", "a test"],
        "gc": lambda: ["--keep", "3"],
        "rollback": lambda: ["--reason", "a test"],
        "promote": lambda: [str(source.integers(1, 9)), "--reason", "a test"],
        "erase": lambda: [str(source.integers(1, 60))],
    }
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115, PTH123
    says_ready.send("ready")
    while True:
        deed = deeds[source.integers(len(deeds))]
        main([deed, *arguments[deed](), *at])
