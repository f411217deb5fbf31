"""Span numbers have 32 bits: with an update every ten minutes, they exceed 32,767 after 227 days."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import load_file

from freshrec.data.catalog import Catalog
from freshrec.data.split import split_log
from freshrec.data.stored_interests import NOT_YET_BORN, StoredInterests
from freshrec.data.synthetic import make_world
from freshrec.learn.fit import FitConfig
from freshrec.models import COMIREC_DR
from freshrec.models.absorb import absorb_block
from freshrec.store.checkpoint import load_state, load_tree, save_state
from freshrec.strategies.imsr import IMSR, Detector
from freshrec.types import Batch, Interests, State

GOLD = Path(__file__).parent / "gold"


def test_a_state_of_forty_thousand_spans_updates_once_and_saves(tmp_path: Path) -> None:
    log = make_world("newborn", users=40, items=30, events=600, spans=2).log
    base, day, _ = split_log(log, by="count", spans=2, forget_users=0).spans
    strategy = IMSR(detect=Detector(c1=0.5), fit=FitConfig(base_epochs=1, epochs=1))
    state = absorb_block(State(replace(COMIREC_DR, d=4).build(0)), base.events, base.n_users, base.n_items)
    state = strategy.update(state, base)
    interests = state.interests
    assert interests is not None and not interests.born_S.any()
    born_S = torch.full_like(interests.born_S, 39_999)
    state = replace(state, interests=replace(interests, born_S=born_S, used_S=born_S.clone()), spans_seen=40_000)
    day = replace(day, index=40_000)
    after = strategy.update(absorb_block(state, day.events, day.n_users, day.n_items), day)
    save_state(after, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded.spans_seen == 40_001 and loaded.interests is not None
    # the users of span 40,000 used some of their interests in it; the interests of other users are unchanged
    assert loaded.interests.used_S.unique().tolist() == [39_999, 40_000]
    assert set(loaded.interests.born_S.tolist()) <= {39_999, 40_000}


def test_initial_interests_of_a_new_user_are_never_old() -> None:
    # User 1 has an interest that was born in span 40,000. User 2 has none, so the model's initial slots are used.
    born_S = torch.tensor([40_000], dtype=torch.int32)
    interests = Interests(torch.ones(1, 2), torch.tensor([0, 0, 1, 1]), born_S, born_S)
    batch = Batch(torch.tensor([1, 2]), torch.tensor([[1], [1]]))
    for span, is_old in ((40_000, False), (40_001, True), (2**31 - 1, True)):
        old_BK = StoredInterests(interests, torch.ones(1, 2), span).attach(batch).old_BK
        assert old_BK is not None and old_BK.tolist() == [[is_old], [False]]
    assert NOT_YET_BORN == 2**31 - 1


def test_a_catalog_stores_span_numbers_with_32_bits() -> None:
    catalog = Catalog.empty().extend(pl.Series(["a", "b"]), 39_999).extend(pl.Series(["b"]), 40_000)
    assert catalog.frame["last_span"].to_list() == [39_999, 40_000]
    assert catalog.reset_spans().frame.schema == catalog.frame.schema


def test_span_numbers_that_0_1_0_saved_with_16_bits_are_read_with_32() -> None:
    path = GOLD / "store-0.1.0-comirec-dr/versions/2/learning.safetensors"
    interests = load_tree(path)[1].interests  # from the memory of ASMG
    saved = load_file(path)
    for name, now_S in (("born_S", interests.born_S), ("used_S", interests.used_S)):
        [before_S] = [tensor for key, tensor in saved.items() if key.endswith(name)]
        assert before_S.dtype == torch.int16 and now_S.dtype == torch.int32
        assert torch.equal(before_S.int(), now_S) and len(now_S)
