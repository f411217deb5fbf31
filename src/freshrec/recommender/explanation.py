"""The explanation of a score in sentences, with contributions that add up to a total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freshrec.data.batches import MAX_BATCH_VALUES
from freshrec.models.blend.experts import COUNTER_SPECS, Experts
from freshrec.models.blend.model import Blend, Reason
from freshrec.models.item_knn import ItemKNN, event_contributions
from freshrec.models.popularity import Popularity, PopularitySpec
from freshrec.models.repeat import Repeat
from freshrec.nn.scoring import score_items
from freshrec.recommender.explain import find_reasons
from freshrec.recommender.ids import resolve_request, rows_of_pair
from freshrec.recommender.list_request import Id, ListRequest
from freshrec.recommender.lists import make_lists, user_batch
from freshrec.recommender.profile_text import time_in_words
from freshrec.recommender.served_state import ServedState
from freshrec.recommender.user_profile import PastEvent, past_events, user_events
from freshrec.text_layout import align_rows, format_count, printable_id, wrap_lines
from freshrec.types import Batch, Model, VectorModel

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
    rank: int  # in the list of all items that the user does not have yet, or of all items if the user has this one
    n_ranked: int  # length of this list; popular items complete it, as in every list
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
    events: dict[int, list[PastEvent]] = {}
    for past_item, event in zip(items_T.tolist(), past_events(served, items_T, times_T, has_clock)):
        events.setdefault(past_item, []).append(event)
    reasons, n_own = find_reasons(model, batch, item_row), int((items_T == item_row).sum())
    score, rank, n_ranked = _place_in_list(served, users_1, item_row, exclude_seen=not n_own)
    if not reasons:
        about = _describe_missing_score(model, batch, item_row, model_name)
        if score is not None:
            about += " Popular items complete a list, after the items that the model scores. This item is one of them. "
            about += "Its score is its number of events, and older events count less."
        return Explanation(user, item, score, rank, n_ranked, n_own, (), about)
    assert score is not None  # an item with reasons is in the list
    scored = ScoredItem(model, batch, item_row, score, reasons, events)
    parts, about = _split_score(scored, model_name)
    return Explanation(user, item, score, rank, n_ranked, n_own, tuple(parts), about)


def _place_in_list(
    served: ServedState, users_1: Tensor, item_row: int, exclude_seen: bool
) -> tuple[float | None, int, int]:
    """Return score and rank of an item in the user's list of all items, and the length of the list.

    This is the list that `recommend` makes, so ties and fallback items have the same ranks. Score None and rank 0 mean
    that the list does not have the item.
    """
    request = ListRequest(len(served.items), exclude_seen)
    lists = make_lists(served, users_1, resolve_request(served, request))
    items_K, found = lists.items_NK[0], (lists.items_NK[0] == item_row).nonzero()[:, 0].tolist()
    score, rank = (float(lists.scores_NK[0, found[0]]), found[0] + 1) if found else (None, 0)
    return score, rank, int((items_K > 0).sum())


@dataclass(frozen=True)
class ScoredItem:
    """A score to explain, with the reasons for it and the past events of the user."""

    model: Model
    batch: Batch
    item: int
    score: float
    reasons: list[Reason]
    events: dict[int, list[PastEvent]]  # item row -> the user's events with it, oldest first

    @property
    def last_events(self) -> dict[int, PastEvent]:
        """The user's last event with each item, by item row."""
        return {item: events[-1] for item, events in self.events.items()}


def _describe_missing_score(model: Model, batch: Batch, item: int, model_name: str) -> str:
    """Say why an item has no score."""
    if item > model.n_items:
        return f"It is newer than the last update of {model_name}, so the model has not learned it yet."
    about = f"{model_name} scores it 0, which means that the model has no opinion."
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
    """Contributions of past events, largest first. They add up to the score.

    Each event of item-kNN has its own contribution. Those of `Repeat` are summed by item.
    """
    model, events = scored.model, {item: list(events) for item, events in scored.events.items()}
    if isinstance(model, ItemKNN):
        values = event_contributions(model, scored.batch, scored.item)
    else:
        values = list(_score_differences(scored).items())
    found = [(events[item].pop(), value) for item, value in reversed(values)]  # the newest event of each item first
    note = ", the largest contribution"
    parts = [Contribution("past events", value, None, event, note) for event, value in reversed(found) if value != 0.0]
    return sorted(parts, key=lambda part: -part.value)


def _score_differences(scored: ScoredItem) -> dict[int, float]:
    """s(events t, t + 1, ...) - s(events t + 1, ...) for each past event t, summed by item.

    The score of `Repeat` is a sum over past events whose weights depend on the number of later events only. So the
    difference is exactly the contribution of event t, and all of them add up to the score.
    """
    history_T = scored.batch.history_BT[0]
    n = len(history_T)
    size = max(1, MAX_BATCH_VALUES // (n + scored.model.n_items + 1))
    scores = []
    for start_B in torch.arange(n + 1).split(size):  # row s starts at event s
        history_BT = torch.where(torch.arange(n) >= start_B[:, None], history_T, 0)
        batch = Batch(scored.batch.users_B.expand(len(start_B)), history_BT)
        scores.append(score_items(scored.model, batch, torch.tensor([scored.item]))[:, 0].double())
    score_S = torch.cat(scores)
    values: dict[int, float] = {}
    for item, value in zip(history_T.tolist(), (score_S[:-1] - score_S[1:]).tolist()):
        values[item] = values.get(item, 0.0) + value
    return values


def explanation_text(found: Explanation) -> str:
    """The explanation in sentences, with a table of contributions and their total; lines of at most 100 characters."""
    paragraphs = [_headline(found), found.about]
    if len(found.contributions) > 1:
        paragraphs.append(_contribution_table(found))
    part = max(found.contributions, key=lambda part: abs(part.value) if part.event else 0.0, default=None)
    if part is not None and part.event is not None and part.value != 0:
        event = f"item {printable_id(part.event.item_id)} {time_in_words(part.event.at)}"
        lowers = " This contribution is negative, so it lowers the score." if part.value < 0 else ""
        paragraphs.append(f"Most important past event: {event}{part.event_note}.{lowers}")
    return "\n\n".join(text if "\n" in text else "\n".join(wrap_lines(text)) for text in paragraphs)


def _headline(found: Explanation) -> str:
    item, user = printable_id(found.item), printable_id(found.user)
    if found.score is None:
        return f"Item {item} is not offered to user {user}."
    among = "the only item" if found.n_ranked == 1 else f"the {found.n_ranked:,} items"
    if found.n_own_events:
        events = format_count(found.n_own_events, "event")
        own = f" The user already has this item ({events}), so lists leave it out by default."
    else:
        own = " Items that the user already has are not ranked."
    rank = f"Item {item} is ranked {found.rank:,} of {among} that can be ranked for user {user}"
    return f"{rank} (score {found.score:.4g}, higher is better).{own}"


def _contribution_table(found: Explanation) -> str:
    """Contributions with their total; those that would print as 0 share a line, unless they are 0 exactly."""
    largest = max(abs(part.value) for part in found.contributions)
    n_decimals = min(8, max(2, 2 - math.floor(math.log10(largest)))) if largest else 2
    by_size = sorted(found.contributions, key=lambda part: -abs(part.value))
    small = [part for part in by_size[:MAX_ROWS] if 0 < abs(part.value) < 0.5 * 10**-n_decimals] + by_size[MAX_ROWS:]
    parts = [part for part in found.contributions if part not in small]
    if small:
        name = format_count(len(small), "smaller contribution")
        parts.append(Contribution(name, sum(part.value for part in small)))
    total = _signed(found.total, n_decimals)
    values = _round_to_total([part.value for part in parts], float(total), n_decimals)
    rows = [
        (_signed(value, n_decimals), part.source, f"{part.rank:,}" if part.rank else "", _event_cell(part.event))
        for value, part in zip(values, parts)
    ]
    rows.append((total, "total", "", ""))
    columns = [column for column in zip(("contribution", "source", "rank", "past item"), *rows) if any(column[1:])]
    return "\n".join(align_rows(list(zip(*columns)), right={0, 2} if any(part.rank for part in parts) else {0}))


def _round_to_total(values: Sequence[float], total: float, n_decimals: int) -> list[float]:
    """Round each value up or down so that they add up to `total`, the rounded sum of all.

    Rounding up goes to the largest remainders, so a value of 0 stays 0.
    """
    scaled = [value * 10**n_decimals for value in values]
    units = [math.floor(value) for value in scaled]
    n_up = round(total * 10**n_decimals) - sum(units)
    for n in sorted(range(len(values)), key=lambda n: units[n] - scaled[n])[:n_up]:
        units[n] += 1
    return [unit / 10**n_decimals for unit in units]


def _signed(value: float, n_decimals: int) -> str:
    """A number with its sign. A number that rounds to 0 has the sign +."""
    return f"{round(value, n_decimals) + 0.0:+.{n_decimals}f}"


def _event_cell(event: PastEvent | None) -> str:
    return "" if event is None else f"{printable_id(event.item_id)} {time_in_words(event.at)}"
