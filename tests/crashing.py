"""A process that changes a store in an endless loop. tests/test_nightly.py kills it at random moments."""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from freshrec.cli.app import main

# Each process is forked from one that has already imported these modules. Importing them takes seconds.
PRELOADED = ["freshrec.nightly.job", "freshrec.recommender.recommender", "freshrec.cli.app", "hypothesis", "pytest"]


def start(folder: Path, commands: str) -> BaseProcess:
    """Start a process that runs random commands from a comma-separated list. It is ready when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=change_endlessly, args=(folder, commands.split(","), sender))
    process.start()
    sender.close()
    with receiver:
        assert receiver.recv() == "ready"
    return process


def change_endlessly(folder: Path, commands: list[str], sender: Connection) -> None:
    """Report that the process is ready, then run random commands with random arguments until it is killed."""
    source, at = np.random.default_rng(), ["--store", str(folder / "s")]
    arguments = {
        "update": lambda: [str(folder / f"day-{source.integers(6)}.parquet"), "--force", "--reason", "a test"],
        "gc": lambda: ["--keep", "3"],
        "rollback": lambda: ["--reason", "a test"],
        "promote": lambda: [str(source.integers(1, 9)), "--reason", "a test"],
        "erase": lambda: [str(source.integers(1, 60))],
    }
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115, PTH123
    sender.send("ready")
    while True:
        command = commands[source.integers(len(commands))]
        main([command, *arguments[command](), *at])
