"""How large a generated world is: the defaults of `make_world`, recipes and the command line. Imports nothing heavy."""

from dataclasses import dataclass

from freshrec.data.split_config import SplitConfig


@dataclass(frozen=True)
class WorldSize:
    """Numbers of users, items and events, and of periods after the base block."""

    users: int = 2000
    items: int = 1000
    events: int = 100_000
    spans: int = SplitConfig.spans
