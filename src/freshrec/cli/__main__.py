"""`python -m freshrec.cli`, as 0.1.0 could be run: the same as `python -m freshrec`."""

import sys

from freshrec.cli.app import main

sys.exit(main())
