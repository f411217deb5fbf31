"""What tests/test_nightly.py kills: it changes the store in a folder for ever."""

import sys
from pathlib import Path

import numpy as np

from freshrec.cli import main
from freshrec.nightly import job  # noqa: F401  (imported before it is ready, as it takes seconds)
from freshrec.serve import recommender  # noqa: F401

folder, source = Path(sys.argv[1]), np.random.default_rng()
at = ["--store", str(folder / "s")]
sys.stdout.write("ready\n")
sys.stdout.flush()
sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115, PTH123
while True:
    deed = source.integers(10)
    if deed < 7:
        main(["update", str(folder / f"day-{source.integers(6)}.parquet"), *at, "--force", "--reason", "a test"])
    elif deed < 8:
        main(["gc", *at, "--keep", "3"])
    else:
        main(["rollback", *at, "--reason", "a test"])
