"""The explanation of a score in sentences, with contributions that add up to a total."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from freshrec.models.blend.experts import COUNTER_SPECS, Experts
from freshrec.models.blend.model import Blend, Reason
from freshrec.models.item_knn import ItemKNN
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import Repeat
from freshrec.nn.scoring import score_items
from freshrec.recommender.explain import find_reasons
from freshrec.recommender.ids import rows_of_pair
from freshrec.recommender.list_request import Id
from freshrec.recommender.lists import user_batch
from freshrec.recommender.served_state import ServedState
from freshrec.recommender.user_profile import PastEvent, past_events, user_events
from freshrec.types import Batch, Model, VectorModel

WIDTH = 100  # characters per line
MAX_ROWS = 15  # rows of a table; the smallest contributions share the last one
EXPERT_LABELS = {
    "popularity": "popularity: all events of the item",
    "repeat-last": "repeat-last: the user's own items, most recent first",
    "repeat-freq": "repeat-freq: the user's own items, most frequent first",
    "item-knn": "item-knn: items that occur near the user's items",
    "markov": "markov: items that follow the user's last items",
    "user-knn": "user-knn: items of similar users",
    "pooled": "pooled: neural expert",
    "own history": "features of the item in the user's history",
    "item": "features of the item: events, age, repeat rate",
    "correction": "neural correction of the weighted sum",
}


@dataclass(frozen=True)
class Contribution:
    """One addend of a total."""

    source: str  # in words
    value: float
    rank: int | None = None  # of the item by this source alone
    event: PastEvent | None = None  # the past event that contributes most to this source
    event_note: str = ""  # why this event


@dataclass(frozen=True)
class Explanation:
    """The score of an item for a user, its rank, and its contributions."""

    user: Id
    item: Id
    score: float | None  # None = not offered
    rank: int  # among the items that the user does not have yet, or among all items if the user has this one
    n_ranked: int
    n_own_events: int  # of the user, with this item
    contributions: tuple[Contribution, ...]  # largest first; they sum to the total
    about: str  # sentences about the score and the total

    @property
    def total(self) -> float:
        """Sum of the contributions."""
        return sum(part.value for part in self.contributions)


def explain_pair(served: ServedState, user: Id, item: Id, model_name: str, has_clock: bool) -> Explanation:
    """Explain the score of an item for a user. Raises OptionError for an unknown user or item.

    `model_name` is what the user typed. `has_clock`: whether the log has timestamps.
    """
    users_1, item_row = rows_of_pair(served, user, item)
    model, batch = served.current_state.model, user_batch(served, users_1)
    items_T, times_T = user_events(served, int(users_1))
    last_events = dict(zip(items_T.tolist(), past_events(served, items_T, times_T, has_clock)))
    reasons, n_own = find_reasons(model, batch, item_row), int((items_T == item_row).sum())
    if not reasons:
        return Explanation(
            user, item, None, 0, 0, n_own, (), _describe_missing_score(model, batch, item_row, model_name)
        )
    score_I = score_items(model, batch, torch.arange(1, model.n_items + 1))[0]
    score, is_ranked_I = float(score_I[item_row - 1]), torch.ones(model.n_items, dtype=torch.bool)
    if not n_own:
        is_ranked_I[items_T[items_T <= model.n_items] - 1] = False
    rank = 1 + int((is_ranked_I & (score_I > score)).sum())
    scored = ScoredItem(model, batch, item_row, score, reasons, last_events)
    parts, about = _split_score(scored, model_name)
    return Explanation(user, item, score, rank, int(is_ranked_I.sum()), n_own, tuple(parts), about)


@dataclass(frozen=True)
class ScoredItem:
    """A score to explain, with the reasons for it and the past events of the user."""

    model: Model
    batch: Batch
    item: int
    score: float
    reasons: list[Reason]
    last_events: dict[int, PastEvent]  # item row -> the user's last event with it


def _describe_missing_score(model: Model, batch: Batch, item: int, model_name: str) -> str:
    """Say why an item has no score."""
    if item > model.n_items:
        return f"It is newer than the last update of {model_name}, so the model has not learned it yet."
    about = "Its score is 0, which means that the model has no opinion."
    if isinstance(model, Blend):
        n_candidates = int((model.candidates(batch)[0][0] > 0).sum())
        n = model.spec.items_per_expert
        best = "best item" if n == 1 else f"best {n:,} items"
        about += f" The blend scores {n_candidates:,} candidates for this user: the {best} of each expert, and "
        about += "recent items of the user."
    return about


def _split_score(scored: ScoredItem, model_name: str) -> tuple[list[Contribution], str]:
    """Return contributions, largest first, and sentences about the score and the total."""
    model = scored.model
    if isinstance(model, Blend):
        return _split_blend(model, scored)
    if isinstance(model, VectorModel):
        return _split_vectors(scored)
    if isinstance(model, ItemKNN | Repeat):
        return _split_by_event(scored), "The score is the sum of the contributions of the user's past events."
    if isinstance(model, Popularity):
        counted = _counted_events(model.spec, model.window_events)
        about = f"The score is the number of events of the item ({counted}). It is the same for every user."
        return [Contribution(counted, scored.score)], about
    return [], f"freshrec cannot split a score of {model_name} into contributions."


def _split_blend(model: Blend, scored: ScoredItem) -> tuple[list[Contribution], str]:
    """Contributions of experts and features: to ln(score) minus its mean, or to the score if one expert ranks alone."""
    last_events, labels = scored.last_events, _expert_labels(model.experts)
    parts = [
        Contribution(
            labels[reason.source],
            reason.contribution,
            reason.rank,
            last_events.get(reason.history_item),
            f", the largest part of {reason.source}",
        )
        for reason in scored.reasons
    ]
    if model.active_rule is None:
        about = f"One expert ranks alone for now ({parts[0].source}). The score is the item's share of its scores."
        return [replace(parts[0], value=scored.score)], about
    n_candidates = int((model.candidates(scored.batch)[0][0] > 0).sum())
    total = sum(part.value for part in parts)
    about = (
        f"The score is a probability: the scores of the user's {n_candidates:,} candidates sum to 1. The contributions "
        f"add up to {_signed(total, 2)}. This is ln(score) minus the mean of ln(score) over the candidates, so the "
        f"score is {math.exp(total):,.3g} times their geometric mean. A positive contribution moves the item up. A "
        f"rank is the item's place by one expert; it is empty beyond place {model.spec.items_per_expert}."
    )
    is_read = bool((scored.batch.history_BT[0, -model.spec.length :] == scored.item).any())
    if scored.item in last_events and not is_read:
        about += (
            f" The experts read the user's last {model.spec.length} events only. This item is not among them, so "
            "repeat-last and repeat-freq do not rank it."
        )
    return parts, about


def _expert_labels(experts: Experts) -> dict[str, str]:
    """Each source of a blend's score in words."""
    counted = {
        name: f"{name}: recent events, {_counted_events(spec, experts.window_events)}"
        for name, spec in COUNTER_SPECS.items()
        if isinstance(spec, PopularitySpec)
    }
    return counted | EXPERT_LABELS


def _counted_events(spec: PopularitySpec, window_events: int) -> str:
    """Describe the events of an item that a popularity model counts."""
    if spec.weighting == "decay":
        return f"half-life {spec.half_life * window_events:,.0f} events"
    return f"only the last {window_events:,} events of the log" if spec.weighting == "last" else "all events"


def _split_vectors(scored: ScoredItem) -> tuple[list[Contribution], str]:
    """The largest inner product is the score; other interests contribute 0."""
    reasons, last_events = scored.reasons, scored.last_events
    best, note = reasons[0], ", the most similar item by cosine"
    if len(reasons) == 1:
        part = Contribution("user vector", best.contribution, best.rank, last_events.get(best.history_item), note)
        about = "The score is one inner product, of the item vector and the user vector. It has no smaller parts."
        return [part], about
    parts = [
        Contribution(
            f"{reason.source}: inner product {_signed(reason.contribution, 2)}",
            reason.contribution if reason is best else 0.0,
            reason.rank if reason.contribution else None,  # a vector of zeros ranks all items the same
            last_events.get(reason.history_item),
            note,
        )
        for reason in reasons
    ]
    about = (
        f"The score is the largest inner product of the item vector with one of the user's {len(reasons)} interests. "
        f"Here {best.source.partition(' of')[0]} has the largest one, so the others contribute 0. "
        "A rank is the item's place by one interest, among all items; it is empty if the inner product is 0."
    )
    return parts, about


def _split_by_event(scored: ScoredItem) -> list[Contribution]:
    """s(events t, t + 1, ...) - s(events t + 1, ...) for each past event t, summed by item.

    Scores of these models are sums over past events whose weights depend on the number of later events only. So the
    difference is exactly the contribution of event t, and all of them add up to the score.
    """
    history_T = scored.batch.history_BT[0]
    n = len(history_T)
    is_kept_ST = torch.arange(n) >= torch.arange(n + 1)[:, None]  # row s starts at event s
    batch = Batch(scored.batch.users_B.expand(n + 1), torch.where(is_kept_ST, history_T, 0))
    score_S = score_items(scored.model, batch, torch.tensor([scored.item]))[:, 0].double()
    values: dict[int, float] = {}
    for item, value in zip(history_T.tolist(), (score_S[:-1] - score_S[1:]).tolist()):
        values[item] = values.get(item, 0.0) + value
    parts = [
        Contribution("past events", value, None, scored.last_events[item], ", the largest contribution")
        for item, value in values.items()
        if value != 0.0
    ]
    return sorted(parts, key=lambda part: -part.value)


def explanation_text(found: Explanation) -> str:
    """The explanation in sentences, with a table of contributions and their total; lines of at most 100 characters."""
    paragraphs = [_headline(found), found.about]
    if len(found.contributions) > 1:
        paragraphs.append(_contribution_table(found))
    for part in found.contributions:
        if part.event is not None and part.value > 0:
            event = f"item {part.event.item_id} {time_in_words(part.event.at)}"
            paragraphs.append(f"Most important past event: {event}{part.event_note}.")
            break
    return "\n\n".join(
        text if "\n" in text else textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    )


def _headline(found: Explanation) -> str:
    if found.score is None:
        return f"Item {found.item} is not offered to user {found.user}."
    if found.n_own_events:
        events = "1 event" if found.n_own_events == 1 else f"{found.n_own_events:,} events"
        among = f"the {found.n_ranked:,} items that can be ranked"
        own = f" The user already has this item ({events}), so lists leave it out by default."
    else:
        among = f"the {found.n_ranked:,} items that can be ranked"
        own = " Items that the user already has are not ranked."
    rank = f"Item {found.item} is ranked {found.rank:,} of {among} for user {found.user}"
    return f"{rank} (score {found.score:.4g}, higher is better).{own}"


def _contribution_table(found: Explanation) -> str:
    """Contributions with their total; those that would print as 0 share a line, unless they are 0 exactly."""
    largest = max(abs(part.value) for part in found.contributions)
    n_decimals = min(8, max(2, 2 - math.floor(math.log10(largest)))) if largest else 2
    by_size = sorted(found.contributions, key=lambda part: -abs(part.value))
    small = [part for part in by_size[:MAX_ROWS] if 0 < abs(part.value) < 0.5 * 10**-n_decimals] + by_size[MAX_ROWS:]
    parts = [part for part in found.contributions if part not in small]
    if small:
        name = "1 smaller contribution" if len(small) == 1 else f"{len(small)} smaller contributions"
        parts.append(Contribution(name, sum(part.value for part in small)))
    rows = [
        (_signed(part.value, n_decimals), part.source, f"{part.rank:,}" if part.rank else "", _event_cell(part.event))
        for part in parts
    ]
    rows.append((_signed(found.total, n_decimals), "total", "", ""))
    return "\n".join(_aligned(("contribution", "source", "rank", "past item"), rows))


def _signed(value: float, n_decimals: int) -> str:
    """A number with its sign. A number that rounds to 0 has the sign +."""
    return f"{round(value, n_decimals) + 0.0:+.{n_decimals}f}"


def _aligned(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table without its empty columns; columns 0 and 2 are aligned to the right."""
    shown = [c for c in range(len(names)) if any(row[c] for row in rows)]
    widths = {c: max(len(row[c]) for row in [names, *rows]) for c in shown}
    return [
        "  ".join(f"{row[c]:>{widths[c]}}" if c in (0, 2) else f"{row[c]:<{widths[c]}}" for c in shown).rstrip()
        for row in [names, *rows]
    ]


def _event_cell(event: PastEvent | None) -> str:
    return "" if event is None else f"{event.item_id} {time_in_words(event.at)}"


def time_in_words(at: str | int) -> str:
    """The date of an event (UTC), or its position in a log without timestamps."""
    return f"at position {at:,}" if isinstance(at, int) else f"on {at[:10]}"
