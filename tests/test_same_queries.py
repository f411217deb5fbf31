"""`freshrec diff` compares two versions on the same queries, which neither of them has learned."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from test_nightly import ANY, days, learn, new_job

from freshrec.nightly.inspection import version_difference
from freshrec.nightly.job import NightlyJob
from freshrec.nightly.same_queries import shared_queries
from freshrec.recommender.bundle import Bundle, read_bundle
from freshrec.recommender.served_state import ServedState
from freshrec.replay.measure import Queries
from freshrec.store.collection import collect_garbage


def read(job: NightlyJob, number: int) -> Bundle:
    return read_bundle(job.store.verified_files(number))


def asked_ids(queries: Queries, served: ServedState) -> set[tuple[int, int]]:
    """User and item of each query."""
    return set(zip(served.users.ids(queries.users_N), served.items.ids(queries.items_N)))


def newest(day: pl.DataFrame, n: int) -> set[tuple[int, int]]:
    return set(day[-n:].select("user_id", "item_id").iter_rows())


@pytest.mark.parametrize("model", ["popularity", "comirec-dr:d=8"])
def test_a_version_and_its_parent_are_compared_as_the_gate_compared_them(model: str, tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base, model)
    learn(job, one, "one")
    [version] = learn(job, two, "two")
    found = version_difference(job.store, 2, 3)["same_queries"]
    value, live = (version.numbers[name] for name in ("ndcg@20", "ndcg@20 live"))
    assert found["metric"] == "ndcg@20" and found["values"] == pytest.approx([live, value], abs=1e-12)
    assert found["difference"] == pytest.approx(value - live, abs=1e-12)
    assert [found["low"], found["high"]] == pytest.approx([version.numbers["low"], version.numbers["high"]], abs=1e-12)
    reverse = version_difference(job.store, 3, 2)["same_queries"]
    assert reverse["difference"] == pytest.approx(live - value, abs=1e-12)


def test_versions_far_apart_are_asked_what_the_newer_one_holds_out(tmp_path: Path) -> None:
    base, *later = days()
    job = new_job(tmp_path / "s", base)
    for i, day in enumerate(later):
        learn(job, day, f"day {i}")
    first, last = read(job, 1), read(job, 5)
    queries = shared_queries(first, last, (job.store.manifest(1), job.store.manifest(5)))
    # A fifth of 300 events is held out. Version 5 has learned what version 1 holds out.
    assert asked_ids(queries, last.served) == newest(later[-1], 60)


def test_after_a_rollback_both_branches_are_asked_what_each_of_them_holds_out(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    job.store.move_pointer(1, "rollback", "a test")
    learn(job, two, "two")
    branches, manifests = (read(job, 2), read(job, 3)), (job.store.manifest(2), job.store.manifest(3))
    queries = shared_queries(*branches, manifests)
    # Version 2 has learned nothing of day two, and version 3 nothing of day one. Both know the base.
    users, items = set(base["user_id"]), set(base["item_id"])
    held_out = [{(u, i) for u, i in newest(day, 60) if u in users and i in items} for day in (one, two)]
    assert asked_ids(queries, branches[0].served) == held_out[0] | held_out[1]
    assert min(map(len, held_out)) > 10
    values = version_difference(job.store, 2, 3)["same_queries"]["values"]
    assert version_difference(job.store, 3, 2)["same_queries"]["values"] == pytest.approx(values[::-1], abs=1e-12)


def test_branches_that_number_new_ids_differently_are_asked_about_what_both_know(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    # The last user and the last item of each day are new, and have another id in each: 1001 and 2001, 1002 and 2002.
    one, two = (
        pl.concat([day, day[-5:].with_columns(user_id=1000 + i, item_id=2000 + i)], how="vertical_relaxed")
        for i, day in ((1, one), (2, two))
    )
    learn(job, one, "one")
    job.store.move_pointer(1, "rollback", "a test")
    learn(job, two, "two")
    branches, manifests = (read(job, 2), read(job, 3)), (job.store.manifest(2), job.store.manifest(3))
    queries = shared_queries(*branches, manifests)
    users, items = (branches[0].served.users, branches[0].served.items)
    assert not {1001, 1002} & set(users.ids(queries.users_N)) and not {2001, 2002} & set(items.ids(queries.items_N))
    assert len(queries) and queries.n_items == len(read(job, 1).served.items)
    assert int(queries.histories_NT.max()) <= queries.n_items
    found = version_difference(job.store, 2, 3)["same_queries"]
    assert found["queries"] == len(queries)


def test_a_redelivered_event_that_one_branch_has_learned_is_no_query(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    job.store.move_pointer(1, "rollback", "a test")
    learn(job, pl.concat([one, two]).sort("time"), "both days")
    manifests = (job.store.manifest(2), job.store.manifest(3))
    queries = shared_queries(read(job, 2), read(job, 3), manifests)
    # Version 3 holds out the newest fifth of 600 events, all of day two. It has learned what version 2 holds out.
    # The first event of a user is no query.
    is_first = pl.concat([base, one, two])["user_id"].is_first_distinct()[-120:]
    assert asked_ids(queries, read(job, 3).served) == newest(two[-120:].filter(~is_first), 120)


def test_a_version_of_a_day_without_rows_equals_its_parent(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    job.add_unchanged_version(None, "nothing")
    found = version_difference(job.store, 2, 3)["same_queries"]
    assert (found["difference"], found["low"], found["high"]) == (0.0, 0.0, 0.0)
    # The 60 events that both hold out are asked once. Two versions with the same files know the same ones.
    assert found["queries"] <= 60


def test_after_a_trial_of_a_full_retrain_only_users_count_that_did_not_choose(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    [version] = learn(NightlyJob(job.store, replace(ANY), "1"), one, "one")
    assert "full_gain" in version.numbers
    queries = shared_queries(read(job, 1), read(job, 2), (job.store.manifest(1), version))
    assert len(queries) and bool((queries.users_N % 2 == 1).all())
    found = version_difference(job.store, 1, 2)["same_queries"]
    assert found["values"][1] == pytest.approx(version.numbers["ndcg@20"], abs=1e-12)


def test_versions_without_files_or_without_held_out_events_say_so_in_one_sentence(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    learn(job, two, "two")
    assert collect_garbage(job.store, keep=1) == [1]
    found = version_difference(job.store, 1, 3)
    assert found["same_queries"] == {"reason": "The files of version 1 were deleted, so it cannot be queried."}
    assert found["shared"] is None and found["sizes"]["events"] == [1500, 2100]
    # Nobody has two events, so that no event can be asked.
    lonely = new_job(tmp_path / "t", base.unique("user_id"))
    learn(lonely, one.unique("user_id").with_columns(user_id=pl.col("user_id") + 1000), "strangers")
    reason = "Versions 1 and 2 cannot be compared: they have no held-out events in common."
    assert version_difference(lonely.store, 1, 2)["same_queries"] == {"reason": reason}
