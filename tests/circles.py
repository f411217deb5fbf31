"""A world that changes direction: users go round circles of items forwards, and later users go backwards."""

from dataclasses import replace

import torch

from freshrec.data.histories import append_events
from freshrec.models.sasrec import SASRecSpec
from freshrec.types import Events, Histories, Span, State, Strategy


def circles(users: range, step: int) -> Events:
    """16 events for each user. The users take turns in going round four circles of 5 items, forwards (step 1) or
    backwards (-1).
    """
    circle_UT = torch.arange(len(users))[:, None] % 4 * 5 + (step * torch.arange(16)) % 5 + 1
    return Events.trainable(torch.tensor(users).repeat_interleave(16), circle_UT.reshape(-1))


def two_periods(strategy: Strategy) -> tuple[State, Span]:
    """A state trained on users 1..60, who go forwards and then leave, and a span of users 61..100, who go backwards."""
    base, after = circles(range(1, 61), 1), circles(range(61, 101), -1)
    spec = SASRecSpec(d=16, negatives=16, length=8, dropout=0.0)
    state = State(spec.build(0), histories=append_events(Histories.empty(), base, 60))
    state = strategy.update(state, Span(0, base, 60, 20))
    return replace(state, histories=append_events(state.histories, after, 100)), Span(1, after, 100, 20)
