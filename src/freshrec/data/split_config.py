"""The options for splitting a log into spans, with their bounds and defaults. `split.py` splits.

This module imports nothing heavy.

`by` is the rule. Events with the same time are never separated.

- count: The base block has the share `alpha` of the events. The later spans have equal numbers of events.
- time: All spans have equal duration, including the base block.
- count-alpha: The base block has the share `alpha` of the events. The later spans have equal duration.
- clock-alpha: The base block has the share `alpha` of the time range. The later spans have equal duration.
- dates: A span starts at each of `dates` (ISO 8601, UTC by default). `spans` is not used.
- period: The first `base_periods` periods are the base block. Later periods are merged into at most `spans` spans.

`targets` selects the tested events. The base block is not tested: all its events are TRAIN, except under `split`.

- last: Each user's last event in a span is TEST. The one before it is VALID, and the rest are TRAIN.
- three: Each user's last event in a span and two random others are TEST, the rest are TRAIN. A user's first event is
  never one of the two.
- all: Every event is TEST, and is trained on right after it was tested.
- split: The split column of the log decides.

`heldout` sets when VALID and TEST events are trained on.

- now: At the update that closes their span.
- next: One update later, like a nightly job that tests each update on events that it has not trained on.
- never: Never.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field

from freshrec.config import Count, CountOrZero, Fraction, Share, check_options
from freshrec.errors import OptionError

SplitRule = Literal["count", "time", "count-alpha", "clock-alpha", "dates", "period"]
TargetRule = Literal["last", "three", "all", "split"]
HeldoutRule = Literal["now", "next", "never"]
SPLIT_RULES, TARGET_RULES, HELDOUT_RULES = get_args(SplitRule), get_args(TargetRule), get_args(HeldoutRule)


@dataclass(frozen=True)
class SplitConfig:
    """Options for splitting a log into a base block and later spans. `split_log`, recipes and CLI share its defaults.

    The docstring of this module explains the values of `by`, `targets` and `heldout`.

    The held-out events of a share `forget_users` of the users are never trained on, so that forgetting can be measured
    on them. With targets = "all", the held-out events of these users are their last two in each later span. `n_targets`
    limits the TEST events only: training stays the same.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # an unknown key of a recipe is an error

    by: Annotated[SplitRule, Field(description=f"Rule for the spans: {', '.join(SPLIT_RULES)}.")] = "count"
    spans: Annotated[Count, Field(description="Number of spans after the base block.")] = 6
    alpha: Annotated[Fraction, Field(description="Share of the log in the base block, between 0 and 1.")] = 0.5
    dates: Annotated[
        tuple[str, ...], Field(description="Start of each span for --by dates, such as 2025-06-01,2025-07-01.")
    ] = ()
    targets: Annotated[TargetRule, Field(description=f"Events that are tested: {', '.join(TARGET_RULES)}.")] = "last"
    heldout: Annotated[
        HeldoutRule, Field(description=f"When held-out events are trained on: {', '.join(HELDOUT_RULES)}.")
    ] = "next"
    min_events: Annotated[Count, Field(description="Leave out users with fewer events in the whole log.")] = 1
    forget_users: Annotated[
        Share, Field(description="Share of users whose held-out events are never trained on, to measure forgetting.")
    ] = 0.05
    base_periods: Annotated[Count, Field(description="Number of periods in the base block for --by period.")] = 1
    n_targets: Annotated[
        CountOrZero, Field(description="Number of tested events per span, of random users; 0 = all.")
    ] = 0
    sessions: Annotated[
        bool, Field(description="Treat a user in each span as a new user: histories end with the span.")
    ] = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.by == "dates" and not self.dates:
            raise OptionError("--by dates needs --dates. Set it, such as --dates 2025-06-01,2025-07-01.")
        if self.by != "dates" and self.dates:
            raise OptionError(f"--dates is set, but --by is {self.by}. Use --by dates, or remove the dates.")
        if self.targets == "all" and self.heldout == "never":
            raise OptionError(
                "--targets all trains on every event, which contradicts --heldout never. Change one of them."
            )
