"""What tests/test_nightly.py kills: it changes the store in a folder for ever."""

import sys
from pathlib import Path

import numpy as np

from freshrec.cli.app import main
from freshrec.nightly import job  # noqa: F401  (imported before it is ready, as it takes seconds)
from freshrec.recommender import recommender  # noqa: F401

folder, deeds, source = Path(sys.argv[1]), sys.argv[2].split(","), np.random.default_rng()
at = ["--store", str(folder / "s")]
sys.stdout.write("ready\n")
sys.stdout.flush()
sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115, PTH123
arguments = {
    "update": lambda: [str(folder / f"day-{source.integers(6)}.parquet"), "--force", "--reason", "a test"],
    "gc": lambda: ["--keep", "3"],
    "rollback": lambda: ["--reason", "a test"],
    "promote": lambda: [str(source.integers(1, 9)), "--reason", "a test"],
    "erase": lambda: [str(source.integers(1, 60))],
}
while True:
    deed = deeds[source.integers(len(deeds))]
    main([deed, *arguments[deed](), *at])
