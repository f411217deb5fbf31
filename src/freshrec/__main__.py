"""`python -m freshrec` is the same as the command `freshrec`."""

import sys

from freshrec.cli.app import main

sys.exit(main())
