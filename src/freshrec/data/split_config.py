"""How a log is cut into spans: every choice, its bounds and its default. Imports nothing heavy; `split.py` cuts.

by            events of one time are never separated
  count         the base has `alpha` of the events, the later spans share the rest equally
  time          all spans are equally long, the base included
  count-alpha   the base has `alpha` of the events, the later spans are equally long
  clock-alpha   the base has `alpha` of the time range, the later spans are equally long
  dates         a span starts at each of `dates` (ISO 8601; UTC where no zone is given), so `spans` is not used
  period        the first `base_periods` are the base; the later ones are merged, in order, into at most `spans` spans
targets       nothing tests the base, so it is all TRAIN, except under `split`
  last          each user's last event in a span is TEST, the one before it VALID, the rest TRAIN
  three         each user's last event in a span and two others with an event before them, drawn at random, are TEST,
                the rest TRAIN
  all           every event is TEST, and joins training at once: test, then train
  split         what the log's own split column says
heldout       when VALID and TEST events join training
  now           at the update that closes their span: tested, then trained on
  next          an update later, as in a nightly job that judges each update by a tail it has not trained on
  never         never
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
    """How a log is cut into a base block and later spans. The defaults of `split_log`, recipes and the command line.

    For a share `forget_users` of the users, held-out events (under targets = "all": the last two of each later span)
    never join training, so that forgetting can be measured on them. `n_targets` limits the TEST events only: what is
    learned, and when, stays the same.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # an unknown key of a recipe is an error

    by: Annotated[SplitRule, Field(description=f"How the log is cut: {', '.join(SPLIT_RULES)}.")] = "count"
    spans: Annotated[Count, Field(description="Number of spans after the base block.")] = 6
    alpha: Annotated[Fraction, Field(description="The base block's share of the log.")] = 0.5
    dates: Annotated[
        tuple[str, ...], Field(description="Where spans start, for a cut by dates, as in 2025-06-01,2025-07-01.")
    ] = ()
    targets: Annotated[TargetRule, Field(description=f"What is tested: {', '.join(TARGET_RULES)}.")] = "last"
    heldout: Annotated[
        HeldoutRule, Field(description=f"When held-out events join training: {', '.join(HELDOUT_RULES)}.")
    ] = "next"
    min_events: Annotated[Count, Field(description="Leave out users with fewer events in the whole log.")] = 1
    forget_users: Annotated[
        Share, Field(description="Share of users whose held-out events never join training, to measure forgetting.")
    ] = 0.05
    base_periods: Annotated[Count, Field(description="Number of periods in the base block, for a cut by period.")] = 1
    n_targets: Annotated[
        CountOrZero, Field(description="Test about this many events of a span, of random users; 0 = all.")
    ] = 0
    sessions: Annotated[
        bool, Field(description="Treat a user of another span as another user: histories end with the span.")
    ] = False

    def __post_init__(self) -> None:
        check_options(self)
        if (self.by == "dates") != (len(self.dates) > 0):
            raise OptionError(
                f'{len(self.dates)} dates were given to a cut by "{self.by}"; dates and by = "dates" go together.'
            )
        if self.targets == "all" and self.heldout == "never":
            raise OptionError(
                'targets = "all" tests every event and then trains on it; heldout = "never" contradicts it.'
            )
