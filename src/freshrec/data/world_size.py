"""The size of a generated world: the defaults of `make_world`, recipes and the CLI. Imports nothing heavy."""

from dataclasses import dataclass

from freshrec.data.split_config import SplitConfig


@dataclass(frozen=True)
class WorldSize:
    """The size of a generated world."""

    users: int = 2000  # number of users
    items: int = 1000  # number of items
    events: int = 100_000  # number of events
    spans: int = SplitConfig.spans  # number of periods after the base block
