"""Case study of interests under IMSR: one user's interests by span, and the birth spans of interests near the targets.

`python benchmarks/case_interests.py --data FOLDER` writes benchmarks/results/case-interests.json, the source of a
section of docs/results.md. Log, split and model are those of recipes/cases-uci.toml; one seed.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from freshrec.data.batches import close_gaps, split_chunks
from freshrec.data.stored_interests import pad_interests, stored_interests_of
from freshrec.models import find_model
from freshrec.nn.scoring import item_vectors, user_vectors
from freshrec.replay.cell import absorb_block
from freshrec.replay.measure import make_queries, split_into_blocks
from freshrec.replay.recipe_schema import load_recipe
from freshrec.replay.recipes import load_split
from freshrec.strategies import find_strategy
from freshrec.types import Batch, InterestModel, Interests, Span, State

HERE = Path(__file__).resolve().parent
NEAREST = 3  # number of items shown for an interest


def study(
    data: Annotated[str, typer.Option(help="The folder of the logs.")] = ".",
    strategy: str = "imsr",
    recipe: Path = HERE.parent / "recipes/cases-uci.toml",
) -> None:
    """Replay the recipe's model with one strategy, and record the interests after each update."""
    resolved = load_recipe(recipe)
    resolved = resolved.model_copy(update={"log": resolved.log.model_copy(update={"folder": data})})
    cut, update = load_split(resolved), find_strategy(strategy)
    state, states = State(find_model(resolved.replay.models[0]).build(0)), []
    for span in cut.spans[:-1]:
        state = update.update(absorb_block(state, span.events, span.n_users, span.n_items), span)
        states.append(state)
    user = most_changed(state.interests)
    found = {
        "recipe": recipe.stem,
        "strategy": strategy,
        "spans": [span.name for span in cut.spans],
        "serving": serving(state, cut.spans[-1]),
        "kept": [kept(before, after) for before, after in zip(states, states[1:])],
        "user": [interests_of(state, user, cut.item_catalog) for state in states],
    }
    (HERE / "results" / "case-interests.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["serving"]))


def serving(state: State, span: Span) -> dict[str, list[float]]:
    """Shares by birth span: of all interests, and of the targets of `span` by their nearest interest.

    Only users with interests and targets that the model knows count. Interests are read from the recent history.
    """
    model, users = state.model, state.interests
    assert isinstance(model, InterestModel) and users is not None
    queries = make_queries(state.histories, split_into_blocks(span, model.n_items, 1)[0], model.spec.length)
    has_own_N = users.offsets_U.diff()[queries.users_N.clamp(max=users.n_users)] > 0
    queries = queries[has_own_N & (queries.users_N <= users.n_users) & (queries.items_N <= model.n_items)]
    carried = stored_interests_of(model, users, state.spans_seen)
    assert carried is not None
    n_spans = state.spans_seen
    nearest, there = torch.zeros(n_spans), torch.zeros(n_spans)
    for which in split_chunks(torch.arange(len(queries)), 256):
        part = queries[which]
        known_NT = torch.where(part.histories_NT <= model.n_items, part.histories_NT, 0).long()
        batch = carried.attach(Batch(part.users_N, close_gaps(known_NT)))
        _, alive_BK, born_BK = pad_interests(users, part.users_N, model.initial_interests(model.spec.k))
        target_BD1 = item_vectors(model)[part.items_N][..., None]
        logits_BK = (user_vectors(model, batch) @ target_BD1)[..., 0].masked_fill(~alive_BK, -torch.inf)
        best_B1 = logits_BK.argmax(1, keepdim=True)
        nearest += torch.bincount(born_BK.gather(1, best_B1)[:, 0].long(), minlength=n_spans)[:n_spans]
        there += torch.bincount(born_BK[alive_BK].long(), minlength=n_spans)[:n_spans]
    return {"interests": _shares(there), "targets": _shares(nearest)}


def _shares(counts: Tensor) -> list[float]:
    return [round(float(x), 4) for x in counts / counts.sum().clamp(min=1)]


def kept(before: State, after: State) -> dict[str, float]:
    """Median cosine of interests before and after an update, and the number of new ones, for users who changed."""
    cosines, n_new, n_users = [], 0, 0
    old, new = before.interests, after.interests
    assert old is not None and new is not None
    for user in range(1, old.n_users + 1):
        was, now = _of(old, user), _of(new, user)
        if not len(was) or (len(was) == len(now) and torch.equal(was, now)):
            continue
        n_users, n_new = n_users + 1, n_new + len(now) - len(was)
        same = min(len(was), len(now))
        cosines.append(torch.cosine_similarity(was[:same], now[:same], 1))
    every = torch.cat(cosines) if cosines else torch.zeros(1)
    return {"users": n_users, "median_cosine": round(float(every.median()), 4), "new_interests": n_new}


def most_changed(users: Interests | None) -> int:
    """The first user whose interests were born in the largest number of spans."""
    assert users is not None
    spans_U = [len(users.born_S[a:b].unique()) for a, b in zip(users.offsets_U.tolist(), users.offsets_U[1:].tolist())]
    return max(range(len(spans_U)), key=spans_U.__getitem__)


def interests_of(state: State, user: int, items: Any) -> list[dict[str, Any]]:
    """Birth span and nearest items of each interest of a user."""
    users = state.interests
    assert users is not None
    if user > users.n_users or not len(_of(users, user)):
        return []
    scores_KI = _of(users, user) @ item_vectors(state.model).T
    scores_KI[:, 0] = -torch.inf
    best_KN = scores_KI.topk(NEAREST).indices
    born_K = users.born_S[users.offsets_U[user] : users.offsets_U[user + 1]].tolist()
    return [{"born": born, "items": items.ids(best_N).to_list()} for born, best_N in zip(born_K, best_KN)]


def _of(users: Interests, user: int) -> Tensor:
    return users.vectors_SD[users.offsets_U[user] : users.offsets_U[user + 1]].float()


if __name__ == "__main__":
    typer.run(study)
