"""The blend: its training queries cannot leak the future, its weights recover a known world, and when it is unused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freshrec.data.batches import Targets, due_targets, occurrence_numbers
from freshrec.data.histories import append_events
from freshrec.learn.fit import FitConfig
from freshrec.models.absorb import absorb_block
from freshrec.models.blend.experts import (
    EXPERT_NAMES,
    FEATURES,
    N_EXPERTS,
    POOLED,
    RANK_COLUMN,
    SHARE_COLUMN,
    top_k_indices,
)
from freshrec.models.blend.features import USER_FEATURES
from freshrec.models.blend.model import MAX_JUDGED_QUERIES, Blend, BlendSpec, fit_rule
from freshrec.models.blend.rule import (
    SCORE_SOURCES,
    SIGNIFICANCE_LEVEL,
    QueryLog,
    Rule,
    feature_gain,
    fit_correction,
    fit_listwise,
)
from freshrec.nn.ranking import Exclusions, target_ranks, top_k
from freshrec.random_streams import stream
from freshrec.store.checkpoint import load_state, save_state
from freshrec.strategies.refit import MIN_GAIN_NATS, MIN_GAIN_QUERIES, Refit
from freshrec.types import NEVER, NEXT, NOW, Batch, CandidateModel, Events, Histories, Span, State

near = pytest.approx
USERS, ITEMS = 40, 30


def chain(n: int, seed: int, users: int = USERS) -> Events:
    """After item i, a user takes item i + 1 with probability 3/4, and any item otherwise."""
    source = np.random.default_rng(seed)
    who, items, last = source.integers(1, users + 1, n), np.empty(n, np.int64), source.integers(1, ITEMS + 1, users + 1)
    for i, user in enumerate(who):
        last[user] = last[user] % ITEMS + 1 if source.random() < 0.75 else source.integers(1, ITEMS + 1)
        items[i] = last[user]
    return Events.trainable(torch.from_numpy(who), torch.from_numpy(items))


def fed(blocks: list[Events], **options: int) -> tuple[Blend, Histories]:
    model, histories = BlendSpec(**options).build(0), Histories.empty()
    for block in blocks:
        model.grow(USERS, ITEMS)
        model.absorb(block, histories)
        histories = append_events(histories, block, USERS)
    return model, histories


def query_batch(history: list[int], user: int = 0) -> Batch:
    return Batch(torch.tensor([user]), torch.tensor([history]))


def test_it_learns_to_trust_the_right_expert() -> None:
    model, _ = fed([chain(1200, 0), chain(600, 1)])
    fit_rule(model)
    assert model.rule is not None and list(EXPERT_NAMES)[model.best_expert] == "markov"
    items, scores = model.candidates(query_batch([3, 9, 17]))
    assert items[0, scores[0].argmax()] == 18 and scores.sum().item() == near(1.0)
    assert isinstance(model, CandidateModel)


def test_with_too_few_queries_the_best_expert_ranks_alone() -> None:
    model, _ = fed([chain(1200, 0)])
    assert list(EXPERT_NAMES)[model.best_expert] == "markov"  # even without a refit
    fit_rule(model, min_queries=10_000)
    assert model.rule is None
    batch = query_batch([3, 9, 17])
    own = model.experts.counters["markov"].score(batch, torch.arange(1, ITEMS + 1))
    assert model.score(batch, torch.arange(1, ITEMS + 1)).argmax() == own.argmax()


def test_a_rule_that_ranked_worse_than_an_expert_is_suspended() -> None:
    model, histories = fed([chain(1200, 0), chain(600, 1)])
    fit_rule(model)
    assert model.active_rule is not None
    kept = model.query_log
    ranks_PR = torch.ones(400, N_EXPERTS + 1)
    ranks_PR[:, N_EXPERTS] = 2.0  # always one rank behind every expert
    model.query_log = replace(kept, ranks_PR=ranks_PR)
    fit_rule(model)
    assert model.active_rule is None and model.rule is not None
    [reason] = model.explain(query_batch([3, 9, 17]), 18)
    assert reason.source == EXPERT_NAMES[model.best_expert]
    later = chain(600, 2)
    model.absorb(later, histories)
    assert len(model.query_log.ranks_PR) > 400  # the suspended rule is still compared
    assert not model.query_log.ranks_PR[400:, N_EXPERTS].isnan().any()
    saved, other = model.state_dict(), BlendSpec().build(0)
    other.load_state_dict(saved)
    assert other.active_rule is None and other.rule is not None
    del saved["overruled"]  # older files lack this key
    other.load_state_dict(saved)
    assert other.active_rule is not None
    blocks = 0
    while model.active_rule is None:  # the rule returns once its recent ranks are no worse
        block, blocks = chain(600, 3 + blocks), blocks + 1
        model.absorb(block, histories)
        histories = append_events(histories, block, USERS)
        fit_rule(model)
    assert 0 < blocks <= -(-MAX_JUDGED_QUERIES // 300)


def test_later_events_do_not_change_logged_queries() -> None:
    base = chain(1200, 0)
    one, _ = fed([base, chain(300, 1)])
    two, _ = fed([base, chain(300, 2)])
    n = len(fed([base])[0].query_log.x_QCF)
    assert torch.equal(one.query_log.x_QCF[:n], two.query_log.x_QCF[:n]) and n > 50
    assert not torch.equal(one.query_log.x_QCF[n:][:10], two.query_log.x_QCF[n:][:10])


def test_the_target_is_logged_first_with_its_features_before_the_event() -> None:
    base = chain(1200, 0)
    model, histories = fed([base])
    users, items = torch.tensor([1, 2]), torch.tensor([5, 6])
    expected = []
    for user, item in zip(users, items):
        history = histories.items_R[histories.offsets_U[user] : histories.offsets_U[user + 1]].long()
        found, x = model.experts.candidate_features(Batch(user[None], history[None]))
        expected.append(x[0, found[0] == item][0].half())
    n = len(model.query_log.x_QCF)
    model.absorb(Events.trainable(users, items), histories)
    new = model.query_log.x_QCF[n:, 0]
    assert len(new) and all(any(torch.equal(row, x) for x in expected) for row in new)


def test_features_of_candidates_agree_with_the_scores_of_each_expert_for_all_items() -> None:
    model, _ = fed([chain(1200, 0), chain(600, 1)], items_per_expert=7)
    experts = model.experts
    batch = Batch(torch.tensor([1, 2, 0]), torch.tensor([[0, 3, 9, 3], [4, 9, 2, 7], [0, 0, 0, 0]]))
    items_BC, x_BCF = experts.candidate_features(batch)
    real_BC, all_items, wanted = items_BC > 0, torch.arange(ITEMS + 1), []
    for name, counter in experts.counters.items():
        score_BI = counter.score(batch, all_items)
        share_BI = score_BI / score_BI.sum(1, keepdim=True).clamp(min=1e-9)
        share_BC = (share_BI.gather(1, items_BC) + experts.cache.share_floor).log()
        torch.testing.assert_close(x_BCF[..., SHARE_COLUMN[name]][real_BC], share_BC[real_BC], rtol=1e-5, atol=1e-5)
        rank_BC, own_BC = x_BCF[..., RANK_COLUMN[name]].exp().round(), score_BI.gather(1, items_BC)
        ahead_BC = (score_BI[:, None] > own_BC[..., None]).sum(2)  # ties may come in any order
        level_BC = (score_BI[:, None] == own_BC[..., None]).sum(2)
        offered_BC = real_BC & (rank_BC <= 7)
        assert ((rank_BC > ahead_BC) & (rank_BC <= ahead_BC + level_BC))[offered_BC].all()
        assert (
            ahead_BC[real_BC & (own_BC > 0) & ~offered_BC] + level_BC[real_BC & (own_BC > 0) & ~offered_BC] > 7
        ).all()
        wanted.append((score_BI > 0).sum(1).clamp(max=7) - offered_BC.sum(1))
    assert not torch.stack(wanted).any()  # all items that an expert proposes are candidates
    for b in range(3):
        alone_C, x_CF = (
            part[0] for part in experts.candidate_features(Batch(batch.users_B[b : b + 1], batch.history_BT[b : b + 1]))
        )
        same = [f for f in range(len(FEATURES)) if f not in RANK_COLUMN.values()]  # all features except ranks
        assert set(batch.history_BT[b].tolist()) - {0} <= set(alone_C.tolist())
        for item in set(alone_C.tolist()) & set(items_BC[b].tolist()) - {0}:
            assert torch.equal(x_CF[alone_C == item][0, same], x_BCF[b, items_BC[b] == item][0, same])


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_top_k_indices_are_those_of_a_stable_sort(k: int) -> None:
    values = np.array([2.0, 5, 2, 0, 5, 2, 1])
    assert top_k_indices(values, k).tolist() == [1, 4, 0, 2, 5, 6, 3][:k]


def test_the_query_log_keeps_to_its_limits() -> None:
    model, _ = fed([chain(1200, 0), chain(400, 1)], max_queries=120, queries_per_window=60, negatives_per_query=7)
    kept = model.query_log
    assert len(kept.ranks_PR) == 120  # 60 for the base window of 200 events, then 120 for 400; the last 120 stay
    assert 0 < len(kept.x_QCF) <= 120 and kept.x_QCF.shape[1:] == (8, len(FEATURES)) and kept.real_QC[:, 0].all()
    assert len(fed([chain(1200, 0)], queries_per_window=60)[0].query_log.ranks_PR) == 60


def test_every_user_gets_a_first_query_before_any_user_gets_a_second_one() -> None:
    assert occurrence_numbers(torch.tensor([5, 3, 5, 5, 3])).tolist() == [0, 0, 1, 2, 1]
    assert occurrence_numbers(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_ranks_and_lists_are_those_of_the_scores() -> None:
    model, histories = fed([chain(1200, 0), chain(600, 1)], items_per_expert=4)
    fit_rule(model)
    batch = Batch(torch.tensor([1, 2, 3]), torch.tensor([[0, 3], [4, 9], [0, 0]]))
    scores = model.score(batch, torch.arange(1, ITEMS + 1))
    for target in range(1, ITEMS + 1):
        own = scores[:, target - 1 : target]
        expected = 1 + (scores > own).sum(1) + 0.5 * ((scores == own).sum(1) - 1)
        assert target_ranks(model, batch, torch.full((3,), target)).tolist() == expected.tolist()
    items, best = top_k(model, batch, 3)
    torch.testing.assert_close(best, scores.topk(3).values)
    torch.testing.assert_close(best, scores.gather(1, (items - 1).clamp(min=0)) * (items > 0))
    banned, _ = top_k(model, batch, 3, Exclusions.from_padded(items[:, :1]))
    assert not (banned[:, :, None] == items[:, :1, None]).any()
    allowed, best = top_k(model, batch, 3, allowed_N=torch.tensor([4, 5]))
    assert set(allowed[best > 0].tolist()) <= {4, 5}


def test_a_user_without_history_gets_popular_items() -> None:
    model, _ = fed([chain(1200, 0), chain(600, 1)])
    fit_rule(model)
    nobody = model.score(query_batch([0]), torch.arange(1, ITEMS + 1))
    assert (nobody > 0).any() and torch.isfinite(nobody).all()
    alone = model.score(Batch(torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64)), torch.arange(1, ITEMS + 1))
    torch.testing.assert_close(alone, nobody)


def test_an_own_item_that_no_other_user_has_is_proposed_again() -> None:
    model, histories = fed([chain(1200, 0)])
    twice = np.repeat(np.arange(ITEMS + 1, ITEMS + 301), 2)  # from now on, every user takes each new item twice
    events = Events.trainable(torch.from_numpy(np.repeat(np.arange(300) % USERS + 1, 2)), torch.from_numpy(twice))
    model.grow(USERS, ITEMS + 301)
    model.absorb(events, histories)
    in_history, events = FEATURES.index("in history"), FEATURES.index("events")
    is_own_Q = model.query_log.x_QCF[:, 0, in_history].bool()
    assert is_own_Q[-100:].all() and (model.query_log.x_QCF[-100:, 0, events] == 0).all()  # own items without events
    fit_rule(model)
    assert target_ranks(model, query_batch([4, ITEMS + 301]), torch.tensor([ITEMS + 301]), n_items=ITEMS).tolist() == [
        1
    ]
    assert target_ranks(model, query_batch([4]), torch.tensor([ITEMS + 301]), n_items=ITEMS).tolist() == [np.inf]


def test_a_saved_blend_gives_the_same_scores() -> None:
    model, histories = fed([chain(1200, 0), chain(600, 1)])
    fit_rule(model)
    other = BlendSpec().build(0)
    other.load_state_dict(model.state_dict())
    items = torch.arange(1, ITEMS + 1)
    assert torch.equal(other.score(query_batch([3, 9]), items), model.score(query_batch([3, 9]), items))
    for each in (model, other):
        each.absorb(chain(200, 3), histories)
    assert torch.equal(other.query_log.x_QCF, model.query_log.x_QCF)


def test_a_saved_state_of_a_blend_goes_on_with_its_own_seed_and_moments(tmp_path: Path) -> None:
    base, later = chain(1200, 0), chain(300, 1)
    strategy, span = Refit(fit=FitConfig(epochs=1, max_epochs=2, patience=1)), Span(1, later, USERS, ITEMS)
    state = State(BlendSpec().build(5), seed=5)
    state = strategy.update(absorb_block(state, base, USERS, ITEMS), Span(0, base, USERS, ITEMS))
    save_state(state, tmp_path / "state")
    one, two = (
        strategy.update(absorb_block(before, later, USERS, ITEMS), span).model.state_dict()
        for before in (state, load_state(tmp_path / "state"))
    )
    assert set(one) == set(two) and any("moments" in name for name in one)
    assert all(torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one)


def test_the_network_learns_what_a_weighted_sum_cannot() -> None:
    # The better of two candidates has the larger product of its first two features. No weights express that.
    x = torch.randn(600, 2, len(FEATURES), generator=stream(0, "test"))
    better = x[..., 0] * x[..., 1]
    x = x.gather(1, better.argsort(1, descending=True)[..., None].expand_as(x))
    real, rule = torch.ones(600, 2, dtype=torch.bool), Rule.initial(0)
    z, nothing = rule.standardize(x), torch.zeros(600, 2)
    found = fit_correction(rule, z, nothing, real, 30, stream(1, "test"))
    right = (found.correction(z)[:, 0] > found.correction(z)[:, 1]).float().mean()
    assert right > 0.85 and (rule.correction(z) == 0).all()
    weights = fit_listwise(z, real, torch.zeros(len(FEATURES)), 1e-4)
    assert ((z @ weights)[:, 0] > (z @ weights)[:, 1]).float().mean() < 0.7
    assert fit_correction(rule, z, nothing, real, 0, stream(1, "test")) is rule


def test_listwise_weights_have_zero_gradient() -> None:
    # Two candidates and one feature. In three of four queries the target has 1 and the other 0; in the fourth it is
    # the other way round. Without weight decay sigma(w) = 3 / 4, so w = ln 3.
    x = torch.tensor([[[1.0], [0.0]]] * 3 + [[[0.0], [1.0]]])
    real = torch.ones(4, 2, dtype=torch.bool)
    assert fit_listwise(x, real, torch.zeros(1), 0.0).item() == near(np.log(3), abs=1e-3)
    padded = torch.cat([x, torch.full((4, 1, 1), 9.0)], 1), torch.cat([real, ~real[:, :1]], 1)
    assert fit_listwise(*padded, torch.zeros(1), 0.0).item() == near(np.log(3), abs=1e-3)
    # With decay, the gradient is p - 3/4 + 2 decay w = 0.
    w = fit_listwise(x, real, torch.zeros(1), 0.1 * len(x)).item()
    assert 1 / (1 + np.exp(-w)) - 0.75 + 0.2 * w == near(0.0, abs=1e-4)


def test_the_latest_queries_are_the_latest_rows_of_each_column() -> None:
    source = stream(0, "test")
    kept = QueryLog(torch.rand(5, 2, 3, generator=source).half(), torch.ones(5, 2) > 0, torch.rand(6, 2))
    latest = kept.latest(3)
    assert torch.equal(latest.x_QCF, kept.x_QCF[2:]) and torch.equal(latest.ranks_PR, kept.ranks_PR[3:])


def test_reasons_add_up_to_the_score_and_name_experts_and_past_items() -> None:
    model, _ = fed([chain(1200, 0), chain(600, 1)])
    fit_rule(model)
    batch = query_batch([3, 9, 17])
    items_BC, score_BC = model.candidates(batch)
    real_C = items_BC[0] > 0
    log_C = score_BC[0, real_C].log()
    for item in (18, 4, 17):
        reasons = model.explain(batch, item)
        above = log_C[items_BC[0, real_C] == item] - log_C.mean()
        assert sum(reason.contribution for reason in reasons) == near(above.item(), abs=1e-4)
        assert [reason.contribution for reason in reasons] == sorted(
            (reason.contribution for reason in reasons), reverse=True
        )
    by_name = {reason.source: reason for reason in model.explain(batch, 18)}
    assert set(by_name) == set(SCORE_SOURCES) and by_name["markov"].rank == 1 and by_name["markov"].history_item == 17
    assert by_name["repeat-last"].rank is None and by_name["pooled"].rank is None  # it was not trained
    assert by_name["markov"].contribution > 0.5
    assert model.explain(batch, 0) == []
    model.rule = None
    assert [reason.source for reason in model.explain(batch, 18)] == ["markov"]
    items_BC, score_BC = model.candidates(batch)
    assert all(model.explain(batch, item) == [] for item in items_BC[score_BC == 0].tolist())


def update(blocks: list[Events], **options: Any) -> list[State]:
    """The states after each block, updated by `refit`, which always trains by default."""
    options = {"trains": "always", "fit": FitConfig(epochs=2, max_epochs=4, patience=3)} | options
    states, strategy = [State(BlendSpec().build(0))], Refit(**options)
    for index, block in enumerate(blocks):
        states.append(strategy.update(absorb_block(states[-1], block, USERS, ITEMS), Span(index, block, USERS, ITEMS)))
    return states[1:]


def test_the_trained_expert_scores_the_queries_before_it_is_trained_on_them() -> None:
    base, later = chain(1200, 0), chain(600, 1)
    after, counting = update([base, later]), update([base, later], trains="never")
    scored, unscored = (states[0].model.query_log.x_QCF for states in (after, counting))
    columns = [SHARE_COLUMN["pooled"], RANK_COLUMN["pooled"]]
    others = [column for column in range(len(FEATURES)) if column not in columns]
    assert torch.equal(scored[..., others], unscored[..., others]) and not torch.equal(scored, unscored)
    rank_QC = unscored[..., RANK_COLUMN["pooled"]]
    assert rank_QC.max() == rank_QC[:, 0].min()  # without scores all ranks are equal
    scored_Q = scored[:, 0, RANK_COLUMN["pooled"]]
    assert scored_Q.float().exp().mean() < 8  # mean rank of the targets among 30 items: it has learned the chain
    assert all(int(state.model.experts.trained_model.items.steps_R.sum()) > 0 for state in after)
    assert not any(bool(state.model.experts.trained_model.items.steps_R.any()) for state in counting)
    moved = [state.model.experts.trained_model.items.weights for state in after]
    assert not torch.equal(*moved)


def test_an_update_that_would_harm_the_trained_expert_is_skipped() -> None:
    base, usual = chain(3000, 0), chain(1200, 1)
    turned_E = ITEMS + 1 - usual.items_E
    turned = replace(usual, items_E=turned_E)
    # Only the newest sixth of this block follows the usual chain.
    misleading = replace(usual, items_E=torch.cat([turned_E[:1000], usual.items_E[1000:]]))
    fit = FitConfig(epochs=6, max_epochs=6, patience=6)
    for block, factor in ((turned, 1.0), (misleading, 0.0)):
        before, after = update([base, block], fit=fit)
        old, new = (state.model.experts.trained_model.items.weights for state in (before, after))
        assert after.costs["lr_factor"] == factor and torch.equal(old, new) == (factor == 0)
    assert "lr_factor" not in update([base, misleading], fit=fit, guard=False)[1].costs


def test_a_trained_expert_that_adds_nothing_is_dropped_and_costs_nothing_afterwards() -> None:
    source = torch.Generator().manual_seed(0)  # random items: there is nothing to learn
    draws = [chain(n, seed) for seed, n in enumerate((3000, 600))]
    base, later = (replace(e, items_E=torch.randint(1, ITEMS + 1, (len(e),), generator=source)) for e in draws)
    tried, counting = update([base, later], trains="worth"), update([base, later], trains="never")
    assert tried[0].costs["trained_worth_p"] >= SIGNIFICANCE_LEVEL
    assert "train_cpu_s" in tried[0].costs and "train_cpu_s" not in tried[1].costs
    assert "rows_read" not in tried[1].costs and not tried[1].model.experts.trained_model.items.steps_R.any()
    for mine, theirs in zip(tried, counting):
        assert mine.model.best_expert == theirs.model.best_expert and not mine.model.pending_queries
        assert (mine.model.rule is None) == (theirs.model.rule is None)
        assert torch.equal(
            mine.model.candidates(query_batch([3, 9]))[1], theirs.model.candidates(query_batch([3, 9]))[1]
        )


def test_an_expert_without_scores_has_no_effect_when_its_floor_moves() -> None:
    model, _ = fed([chain(1200, 0)])  # its trained expert has no scores: all its shares are the floor
    kept = model.query_log
    moved = replace(kept, x_QCF=kept.x_QCF.clone())
    moved.x_QCF[len(kept.x_QCF) // 2 :, :, SHARE_COLUMN["pooled"]] -= 0.5  # as after new items
    for model.query_log in (kept, moved):
        model.rule = None
        fit_rule(model)
        assert model.rule is not None
        _, x_BCF = model.experts.candidate_features(query_batch([3, 9, 17]))
        before = model.rule.scores(x_BCF)
        x_BCF[..., SHARE_COLUMN["pooled"]] -= 1.0
        assert torch.equal(model.rule.scores(x_BCF), before)
        assert not model.rule.std_F[-len(USER_FEATURES) :].isinf().any()


def test_the_gain_of_features() -> None:
    source = torch.Generator().manual_seed(0)
    x_QCF = torch.randn(600, 20, len(FEATURES), generator=source)
    x_QCF[:, 0, 3] += 1.0  # the only feature that identifies the target
    kept = QueryLog(x_QCF.half(), torch.ones(600, 20, dtype=torch.bool), torch.zeros(600, N_EXPERTS + 1))
    nats, p = feature_gain(kept, [3])
    assert (
        nats == near(0.45, abs=0.15) and p < 1e-9
    )  # at most half a nat, the divergence of the two normal distributions
    assert feature_gain(kept, [5, 7])[0] < 0.02 and feature_gain(kept, [5, 7])[1] > SIGNIFICANCE_LEVEL


@pytest.mark.parametrize("name", ["markov", "item-knn", "popularity"])
def test_a_copy_of_another_expert_has_no_gain(name: str) -> None:
    kept = fed([chain(3000, 0)])[0].query_log
    x_QCF, columns = kept.x_QCF.clone(), [SHARE_COLUMN["pooled"], RANK_COLUMN["pooled"]]
    x_QCF[..., columns] = x_QCF[..., [SHARE_COLUMN[name], RANK_COLUMN[name]]]
    nats, p = feature_gain(replace(kept, x_QCF=x_QCF), columns)
    assert len(x_QCF) > MIN_GAIN_QUERIES and (nats < MIN_GAIN_NATS / 2 or p > SIGNIFICANCE_LEVEL)


def counting(passed: list[int], **options: Any) -> Refit:
    """A refit that records the number of targets of each training."""

    class Counted(Refit):
        def _limit_passes(self, fit: FitConfig, targets: Targets) -> tuple[FitConfig, Targets]:
            passed.append(len(targets))
            return super()._limit_passes(fit, targets)

    return Counted(**options)


def test_a_full_retrain_treats_all_events_as_a_base_block() -> None:
    base, later = chain(1200, 0), chain(600, 1)
    later = replace(later, times_E=later.times_E + 1200)
    both = Events.trainable(torch.cat([base.users_E, later.users_E]), torch.cat([base.items_E, later.items_E]))
    [_, after], [whole] = update([base, later], full_retrain=True, trains="never"), update([both], trains="never")
    found, expected = after.model.state_dict(), whole.model.state_dict()
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_full_retrain_trains_on_all_events_except_those_that_the_last_block_defers(tmp_path: Path) -> None:
    passed: list[int] = []
    strategy = counting(passed, full_retrain=True, trains="always", fit=FitConfig(epochs=1, max_epochs=1, patience=1))
    state = State(BlendSpec().build(0))
    for index, (n, expected) in enumerate([(1200, 600 + 0), (600, 1200 + 300), (600, 1800 + 300)]):
        block = chain(n, index)
        half = torch.where(torch.arange(n) % 2 == 0, NEXT, NOW).to(torch.int8)
        span = Span(index, replace(block, train_at_E=half), USERS, ITEMS)
        passed.clear()
        state = strategy.update(absorb_block(state, span.events, USERS, ITEMS), span)
        assert sum(passed) == expected
        save_state(state, tmp_path / "state.safetensors")  # the memory is saved too
        state = load_state(tmp_path / "state.safetensors")
    secret = replace(block, train_at_E=torch.full_like(block.train_at_E, NEVER))
    after = strategy.update(absorb_block(state, secret, USERS, ITEMS), Span(3, secret, USERS, ITEMS))
    assert after.model.experts.item_statistics.n_events == 2400  # of 3000 events


def test_a_blend_that_started_with_too_few_events_trains_later() -> None:
    tiny = Events.trainable(torch.arange(1, 7), torch.arange(1, 7))  # one event per user makes no query
    is_trained = [
        bool(state.model.experts.trained_model.items.steps_R.any()) for state in update([tiny, chain(600, 1)])
    ]
    assert is_trained == [False, True]


def test_the_cache_is_not_older_than_the_trained_expert() -> None:
    for state in update([chain(1200, 0), chain(300, 1)]):
        cache, trained = state.model.experts.cache, state.model.experts.trained_model
        assert len(cache.pool_items_S) == ITEMS
        assert torch.equal(cache.pool_vectors_SD, trained.items.weights[cache.pool_items_S])


def test_training_keeps_to_its_budget_of_passes() -> None:
    # 50 passes allow one epoch on the last 50 targets before the last sixth, and one on the last 50 targets of it.
    # Either has at most 40 windows (one per user) in batches of 16, so at most 3 steps. A step moves an item once.
    few, many = (
        update([chain(1200, 0)], max_passes=passes)[0].model.experts.trained_model.taken for passes in (50, 4000)
    )
    assert 0 < few.steps_R.max() <= 6 < many.steps_R.max()


def test_deferred_events_are_trained_on_once_at_their_update() -> None:
    base = chain(1200, 0)
    held = replace(base, train_at_E=torch.where(torch.arange(len(base)) % 2 == 0, NEXT, NOW).to(torch.int8))
    span = Span(0, held, USERS, ITEMS)
    passed: list[int] = []
    counting(passed, fit=FitConfig(epochs=1, max_epochs=1, patience=1)).update(
        absorb_block(State(BlendSpec().build(0)), held, USERS, ITEMS), span
    )
    assert sum(passed) == 600


def test_the_trained_expert_can_be_the_best_one() -> None:
    [state] = update([chain(1200, 0)])
    kept = state.model.query_log
    assert kept.ranks_PR[:, POOLED].isfinite().float().mean() > 0.5  # it has ranks in the base block too
    found = kept.ranks_PR[kept.ranks_PR[:, :POOLED].isfinite().any(1), POOLED]
    place = kept.x_QCF[:, 0, RANK_COLUMN["pooled"]].float().exp().round()
    assert torch.equal(found.nan_to_num(posinf=101), place)


def test_a_large_log_gets_fewer_epochs_or_only_its_most_recent_targets() -> None:
    histories = append_events(Histories.empty(), chain(100, 0), USERS)
    targets = due_targets(histories)
    for passes, n_epochs, n_targets in ((500, 5, 100), (250, 2, 100), (40, 1, 40)):
        fit, kept = Refit(max_passes=passes)._limit_passes(FitConfig(epochs=5), targets)
        assert (fit.epochs, len(kept)) == (n_epochs, n_targets)
        times = histories.times_R[kept.rows_N]
        assert times.min() == 100 - n_targets  # the most recent ones, in the same order
        assert torch.equal(kept.rows_N, kept.rows_N.sort().values)


def test_scores_of_the_trained_expert_for_the_base_block_do_not_depend_on_its_last_window() -> None:
    base = chain(1200, 0)
    window = round(len(base) / 6)
    early, late = base[:-window], base[-window:]
    shuffled = replace(late, items_E=late.items_E.flip(0))
    seen: list[torch.Tensor] = []

    class Watched(Blend):
        def score_pending_queries(self) -> None:
            seen.append(self.experts.trained_model.items.weights.clone())
            super().score_pending_queries()

    for last in (late, shuffled):
        both = Events(
            *(None if a is None else torch.cat([a, b]) for a, b in zip(vars(early).values(), vars(last).values()))
        )
        state = State(Watched(BlendSpec(), 0))
        one_epoch = Refit(fit=FitConfig(epochs=1, max_epochs=1, patience=1))
        one_epoch.update(absorb_block(state, both, USERS, ITEMS), Span(0, both, USERS, ITEMS))
    assert torch.equal(*seen)
