"""The nightly job: every event is learned once and in order, whatever happens. A worse version is not promoted."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import crashing
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrec.cli.app import main
from freshrec.data.log import read_log
from freshrec.data.synthetic import make_world
from freshrec.errors import LogError, OptionError, StateError, TrainingError
from freshrec.nightly import challenger as challenger_module
from freshrec.nightly import job as job_module
from freshrec.nightly.delivery_checks import waiting_batches
from freshrec.nightly.full_retrain import GAIN_KEY, retrain_interval, retrain_plan, updates_since_retrain
from freshrec.nightly.gate import GateLimits
from freshrec.nightly.inspection import user_profile
from freshrec.nightly.job import NightlyJob, hash_source, preview_delivery
from freshrec.recommender.bundle import Bundle, new_bundle, read_bundle
from freshrec.recommender.recommender import Recommender
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, create_store, open_store, version_chain

ANY = GateLimits(
    tolerance=0.99,
    forgetting=0.99,
    max_growth_factor=1e9,
    max_drop_factor=1e9,
    max_shortening_factor=1e9,
    min_floor_versions=1000,
    max_rise=1.0,
    max_small_rise=1.0,
    max_share_top_user=1.0,
    max_share_top_item=1.0,
    max_share_unknown=1.0,
    max_share_doubled=1.0,
    max_share_late=1.0,
    max_share_same_second=1.0,
)
SIZE = 300
# One epoch is enough, because quality is tested elsewhere.
FAST = dict.fromkeys(("mf:d=8", "sasrec:d=8", "comirec-dr:d=8"), "finetune:fit.base_epochs=1:fit.epochs=1")


def days(n: int = 4) -> list[pl.DataFrame]:
    """A base of 1,500 events and `n` days of 300 events after it, from a world in which users drift."""
    frame = make_world("drift", users=120, items=50, events=1500 + n * SIZE).log.frame.select(
        "user_id", "item_id", "time"
    )
    return [frame[:1500], *(frame[1500 + i * SIZE : 1500 + (i + 1) * SIZE] for i in range(n))]


def new_job(folder: Path, base: pl.DataFrame, model: str = "popularity", limits: GateLimits = ANY) -> NightlyJob:
    """Fit the first version of a store on `base` and return the nightly job of the store."""
    with create_store(folder) as store:
        NightlyJob(store, limits).fit_first_version(read_log(base), "base", new_bundle(model, FAST.get(model), 0))
    return NightlyJob(open_store(folder), limits)


def learn(job: NightlyJob, frame: pl.DataFrame, source: str) -> list[Manifest]:
    """Deliver `frame`, update, and return the new versions."""
    job.append_delivery(read_log(frame), source)
    return list(job.catch_up())


def n_learned(bundle: Bundle) -> int:
    """Number of events that a popularity model has counted or will count with the next update."""
    return round(float(bundle.served.state.model.counts_I.sum())) + len(bundle.served.pending)


def test_every_event_is_learned_once_and_held_out_events_with_the_next_update(tmp_path: Path) -> None:
    base, *later = days()
    job = new_job(tmp_path / "s", base)
    first = job.bundle
    # 5 % of the first log are held out, then 20 % of each day
    assert len(first.served.pending) == 75 and n_learned(first) == 1500
    for i, day in enumerate(later):
        [version] = learn(job, day, f"day {i}")
        assert (version.promoted, version.parent, version.held) == (True, i + 1, 60)
        assert n_learned(job.bundle) == 1500 + (i + 1) * SIZE
    assert [manifest.id for manifest in version_chain(job.store)] == [1, 2, 3, 4, 5]
    whole = pl.concat([base, *later])
    assert job.log.read().sort("time").select("user_id", "item_id").equals(whole.select("user_id", "item_id"))


@pytest.mark.parametrize("model", ["item-knn", "blend", "comirec-dr:d=8"])
def test_a_loaded_version_gives_the_same_lists_and_histories_hold_the_newest_events(model: str, tmp_path: Path) -> None:
    base, day, *_ = days()
    job = new_job(tmp_path / "s", base, model)
    [version] = learn(job, day, "day")
    bundle = job.bundle
    again = read_bundle(open_store(tmp_path / "s").verified_files(version.id))
    users = day["user_id"].unique()
    lists = Recommender.from_bundle(bundle).recommend(users, 5)
    assert lists.equals(Recommender.from_bundle(again).recommend(users, 5))
    assert lists.equals(Recommender.load(tmp_path / "s").recommend(users, 5))
    last = day[-1]
    histories, row = bundle.served.current_state.histories, int(bundle.served.users.rows(last["user_id"]))
    assert (
        bundle.served.items.ids(histories.items_R[histories.offsets_U[row + 1] - 1][None].long())[0]
        == last["item_id"][0]
    )
    metric = job.limits.metric
    assert 0 <= version.numbers[metric] <= 1 and version.numbers[f"{metric} live"] >= 0


def test_repeated_rows_count_once_and_overlaps_and_duplicates_are_reported(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    result = job.append_delivery(read_log(one), "one")
    assert (result.batch, result.repeated_batch, result.n_known, waiting_batches(job.store, job.log)) == (
        None,
        2,
        SIZE,
        [],
    )
    result = job.append_delivery(read_log(pl.concat([one[200:], two, two[:10]])), "overlapping")
    assert (result.n_known, result.n_duplicates, result.n_appended) == (100, 10, SIZE)
    [version] = NightlyJob(job.store, job.limits).catch_up()  # as if the first process had died
    shares = [version.data["day"][name] * (SIZE + 110) for name in ("share_known", "share_doubled")]
    assert n_learned(job.bundle) == 1500 + 2 * SIZE and shares == pytest.approx([100, 10])


def test_late_rows_are_inserted_into_histories_by_time_and_reported(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    late = base.filter(pl.col("user_id") == base["user_id"][0])[:4]
    late = late.with_columns(time=pl.col("time") + 1, item_id=pl.lit(50, pl.Int64))
    job = new_job(tmp_path / "s", base, "comirec-dr:d=8")
    [version] = learn(job, pl.concat([late, one]), "one")
    assert version.numbers["late"] == 4 and version.data["day"]["share_late"] == pytest.approx(4 / (SIZE + 4))
    recent = job.bundle.served.current_state.histories
    for user in range(1, recent.n_users + 1):
        times = recent.times_R[recent.offsets_U[user] : recent.offsets_U[user + 1]]
        assert bool((times.diff() >= 0).all())
    learn(job, two, "two")
    assert len(job.log.read()) == 1500 + 4 + 2 * SIZE


def test_a_day_without_rows_makes_a_version_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, day, *_ = days()
    base.write_parquet(tmp_path / "base.parquet")
    day[:0].write_parquet(tmp_path / "none.parquet")
    day.write_csv(tmp_path / "day.csv")
    at = ["--store", str(tmp_path / "s")]
    assert main(["fit", str(tmp_path / "base.parquet"), *at, "--model", "popularity"]) == 0
    assert main(["update", str(tmp_path / "none.parquet"), str(tmp_path / "day.csv"), *at]) == 0
    output = capsys.readouterr().out
    assert "Version 2 is live. It is a copy of version 1, because there were no new events." in output
    assert "Version 3 is live (updated from version 2)." in output
    (note,) = open_store(tmp_path / "s").manifest(2).notes
    assert note == "The delivery had no new events, so the model is that of version 1."
    one, two = (os.stat(tmp_path / "s" / "versions" / n / "served.safetensors").st_ino for n in "12")  # noqa: PTH116
    assert one == two


def test_missed_days_are_caught_up_in_order(tmp_path: Path) -> None:
    base, *later = days()
    job = new_job(tmp_path / "s", base)
    for i, day in enumerate(later[:3]):
        job.append_delivery(read_log(day), f"day {i}")  # and then the process is killed
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    assert waiting_batches(job.store, job.log) == [2, 3, 4]
    assert [version.batch for version in job.catch_up()] == [2, 3, 4]
    assert n_learned(job.bundle) == 1500 + 3 * SIZE and waiting_batches(job.store, job.log) == []


def test_a_refused_day_keeps_the_live_version_and_can_be_learned_later(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    bot = one.with_columns(user_id=pl.lit(7))
    job.limits = GateLimits()
    [refused] = learn(job, bot, "bot")
    assert not refused.promoted and "to one user" in refused.reasons[0]
    assert job.store.live == 1 and n_learned(job.bundle) == 1500
    assert list(job.catch_up()) == []  # it is not tried again every night
    job.limits = ANY
    [version] = learn(job, two, "two")
    assert (version.id, version.parent, n_learned(job.bundle)) == (3, 1, 1500 + SIZE)
    version = job.relearn(2)
    assert (version.id, version.parent, version.batch) == (4, 3, 2) and n_learned(job.bundle) == 1500 + 2 * SIZE
    with pytest.raises(OptionError, match="has learned all events of version 3 already"):
        job.relearn(3)


def test_force_makes_a_refused_version_live_and_records_both_reasons(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits())
    job.append_delivery(read_log(one.with_columns(user_id=pl.lit(7))), "bot")
    [version] = job.catch_up("the fair brought them")
    assert not version.promoted and version.reasons and "the fair brought them" in version.notes[-1]
    assert job.store.live == 2 and job.store.moves()[-1].reason == "the fair brought them"


def test_events_that_were_rolled_back_are_learned_again_only_on_request(tmp_path: Path) -> None:
    base, one, two, three, _ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    learn(job, two, "two")
    job.store.move_pointer(2, "rollback", "a bad import")
    assert waiting_batches(job.store, job.log) == [] and n_learned(job.bundle) == 1500 + SIZE
    [version] = learn(job, three, "three")
    assert (version.id, version.parent, n_learned(job.bundle)) == (4, 2, 1500 + 2 * SIZE)
    assert job.relearn(3).parent == 4 and n_learned(job.bundle) == 1500 + 3 * SIZE


def test_a_corrected_delivery_is_learned_completely_if_the_wrong_one_was_refused_or_rolled_back(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)
    job.limits = GateLimits(separate=False)
    bot = one.with_columns(
        user_id=pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit(7, one["user_id"].dtype)).otherwise("user_id")
    )
    # rows that the bot did not change
    n_unchanged = one.filter(pl.int_range(pl.len()) % 2 == 0, pl.col("user_id") == 7).height
    assert not learn(job, bot, "bot")[0].promoted
    job.limits = ANY
    result = job.append_delivery(read_log(one), "one")
    assert (result.n_appended, result.n_known) == (
        SIZE,
        0,
    )  # half of the rows were delivered before, but no live version has learned them
    list(job.catch_up())
    assert n_learned(job.bundle) == 1500 + SIZE
    half = two.head(SIZE // 2).with_columns(item_id=pl.lit(3, two["item_id"].dtype))
    learn(job, pl.concat([half, two.tail(SIZE // 2)]), "a bad import")
    job.store.move_pointer(3, "rollback", "it was bad")
    assert learn(job, two, "the import, fixed")[0].numbers["new_events"] == SIZE
    assert n_learned(job.bundle) == 1500 + 2 * SIZE
    # only those events of the refused version that were not learned from another batch since
    assert job.relearn(2).numbers["new_events"] == SIZE // 2 - n_unchanged
    batches = [version.batch for version in version_chain(job.store)]
    assert n_learned(job.bundle) == len(job.log.read(batches)) == 1500 + 2 * SIZE + SIZE // 2 - n_unchanged


def test_a_waiting_delivery_is_not_learned_twice_if_a_version_with_its_events_is_promoted(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    job.store.move_pointer(1, "rollback", "for a while")
    job.append_delivery(read_log(one.tail(200)), "the end of it")  # and then the process dies
    job.store.move_pointer(2, "promote", "after all")
    [version] = job.catch_up()
    assert version.kind == "no rows" and n_learned(job.bundle) == 1500 + SIZE


def test_the_next_run_promotes_a_version_if_the_process_died_before_it_went_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "move_pointer", die)
    with pytest.raises(KeyboardInterrupt):
        learn(job, one, "one")
    monkeypatch.undo()
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    assert (job.store.live, job.store.version_numbers()) == (1, [1, 2])
    assert list(job.catch_up()) == [] and job.store.live == 2 and n_learned(job.bundle) == 1500 + SIZE
    job.store.move_pointer(1, "rollback")
    assert list(job.catch_up()) == [] and job.store.live == 1  # it has been live before, so it is not promoted again
    learn(job, two, "two")
    assert n_learned(job.bundle) == 1500 + SIZE


def test_an_update_that_fails_is_a_refused_version_and_later_updates_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base)

    def diverge(*_: object) -> None:
        raise TrainingError("the loss became nan")

    monkeypatch.setattr(challenger_module, "learn_with_holdout", diverge)
    [version] = learn(job, one, "one")
    assert not version.promoted and version.reasons == ["the loss became nan"] and job.store.live == 1
    monkeypatch.undo()
    [version] = learn(job, two, "two")  # with the events of the first day
    assert (version.parent, version.batches) == (1, [2, 3])
    assert n_learned(job.bundle) == 1500 + 2 * SIZE


def test_a_lost_log_is_reported(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    shutil.rmtree(tmp_path / "s" / "log")
    with pytest.raises(StateError, match="log is missing, but version 1 knows 1,500 rows in 1 batch"):
        list(job.catch_up())
    assert main(["status", "--store", str(tmp_path / "s")]) == 7


def test_events_after_the_first_fit_are_new_and_clicks_are_no_duplicates_of_exposures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, one, *_ = days()
    whole = pl.concat([base, one])
    whole.write_parquet(tmp_path / "whole.parquet")
    at, until = ["--store", str(tmp_path / "s")], pl.Series([one["time"][0]]).cast(pl.Datetime("us")).dt.to_string()[0]
    log = str(tmp_path / "whole.parquet")
    assert main(["fit", log, *at, "--until", until, "--model", "popularity"]) == 0
    assert main(["update", log, *at, "--force", "--reason", "it is a test"]) == 0
    assert f": {SIZE} new, 1,500 known events skipped" in capsys.readouterr().out
    shown = pl.concat([one.with_columns(label=pl.lit(0)), one.with_columns(label=pl.lit(1))])
    job = new_job(tmp_path / "t", base)
    learn(job, shown, "shown")
    assert n_learned(job.bundle) == 1500 + SIZE
    one.with_columns(label=pl.lit(0)).write_parquet(tmp_path / "none.parquet")
    assert main(["update", str(tmp_path / "none.parquet"), "--store", str(tmp_path / "t")]) == 0
    with pytest.raises(LogError, match="nothing to learn from"):
        new_job(tmp_path / "u", base.with_columns(label=pl.lit(0)))


def test_a_day_may_lack_a_type_of_event(tmp_path: Path) -> None:
    base, one, *_ = days()
    event = pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit("pv")).otherwise(pl.lit("buy"))
    base.with_columns(event=event).write_parquet(tmp_path / "base.parquet")
    at = ["--store", str(tmp_path / "s")]
    assert main(["fit", str(tmp_path / "base.parquet"), *at, "--events", "pv,buy", "--model", "popularity"]) == 0
    for event in ("pv", "cart"):
        one.with_columns(event=pl.lit(event)).write_parquet(tmp_path / "one.parquet")
        assert main(["update", str(tmp_path / "one.parquet"), *at, "--force", "--reason", "it is a test"]) == 0
    assert open_store(tmp_path / "s").manifest(3).kind == "no rows"


def test_text_ids_stay_text_if_the_ids_of_a_delivery_are_digits(tmp_path: Path) -> None:
    base, one, *_ = days()
    named = base.with_columns(item_id=pl.lit("a") + pl.col("item_id").cast(pl.String), category=pl.lit("x1"))
    named.write_csv(tmp_path / "base.csv")
    digits = pl.format("00{}", "item_id")
    one.with_columns(item_id=digits, category=pl.lit(7)).write_csv(tmp_path / "one.csv")
    at = ["--store", str(tmp_path / "s")]
    assert main(["fit", str(tmp_path / "base.csv"), *at, "--model", "popularity"]) == 0
    assert main(["update", str(tmp_path / "one.csv"), *at, "--force", "--reason", "it is a test"]) == 0
    items = Recommender.load(tmp_path / "s").bundle.served.items.frame["id"]
    assert items.str.starts_with("00").any() and not items.is_in([str(i) for i in range(60)]).any()


def test_rows_that_are_learned_later_on_request_do_not_count_as_late(tmp_path: Path) -> None:
    base, one, two, *_ = days()
    job = new_job(tmp_path / "s", base, limits=GateLimits(max_share_top_user=0.0001, separate=False))
    assert not learn(job, one, "one")[0].promoted
    job.limits = GateLimits(max_growth_factor=1e9)
    assert learn(job, two, "two")[0].promoted and job.relearn(2).promoted


@pytest.mark.parametrize("model", ["sasrec:d=8", "mf:d=8", "comirec-dr:d=8", "blend", "item-knn"])
def test_items_that_occur_only_in_held_out_events_break_no_request(model: str, tmp_path: Path) -> None:
    base, one, *_ = days()
    one = pl.concat([one[:-3], one[-3:].with_columns(item_id=pl.lit(999, pl.Int64))])
    job = new_job(tmp_path / "s", base.with_columns(category=pl.lit(1)), model)
    learn(job, one.with_columns(category=pl.lit(2)), "one")
    recommender = Recommender.from_bundle(job.bundle)
    users = [*one["user_id"][-3:], 10**6]
    for options in ({}, {"category": 2}, {"allow": [1, 999]}):
        recommender.recommend(users, 5, **options)  # type: ignore[arg-type]
    assert 999 not in recommender.similar_items([999, 1], 3)["item_id"]
    assert user_profile(job.bundle, users[0])["events"][-1]["item_id"] == 999


def test_a_preview_changes_nothing_and_reports_anomalies(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    job.limits = GateLimits()
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "s").rglob("*"))
    found = preview_delivery(job, read_log(one.with_columns(user_id=pl.lit(7))))
    assert found["day"]["n_rows"] == SIZE and "to one user" in found["odd"][0]
    assert preview_delivery(job, read_log(one))["odd"] == [] and preview_delivery(job, None)["day"] is None
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "s").rglob("*")) == before


def test_a_delivery_of_another_type_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    for wrong in (one.with_columns(pl.col("item_id").cast(pl.String) + "x"), one.drop("time").with_columns(period=1)):
        with pytest.raises(LogError):
            job.append_delivery(read_log(wrong), "wrong")
    assert len(job.log.batches()) == 1 and job.store.version_numbers() == [1]


def test_a_log_without_timestamps_continues_and_recognizes_the_same_file(tmp_path: Path) -> None:
    base, one, *_ = (day.drop("time").with_columns(period=pl.lit(1), order=pl.int_range(pl.len())) for day in days())
    job = new_job(tmp_path / "s", base)
    learn(job, one, "one")
    assert job.append_delivery(read_log(one), "one").repeated_batch == 2
    assert n_learned(job.bundle) == 1500 + SIZE and job.log.read()["time"].is_sorted()
    Recommender("popularity").fit(base).save(tmp_path / "p")
    job = NightlyJob(open_store(tmp_path / "p"), ANY)
    assert learn(job, one, "one")[0].numbers["late"] == 0
    with_times = days()[2].reverse()  # rows are ordered by time
    assert learn(job, with_times, "two")[0].numbers["late"] == 0
    assert job.log.read([2])["item_id"].to_list() == days()[2].sort("time", maintain_order=True)["item_id"].to_list()


def test_a_disk_that_is_full_at_any_file_is_reported_and_the_next_run_continues(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk. Each library reacts to it differently."""
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base)
    job.append_delivery(read_log(one), "one")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "s" / "versions" / "1").iterdir())
    previous, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, *(size - 1 for size in sizes)):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(
                StateError, match=r"cannot be written .*\. The live version has not changed\. Check free disk space"
            ):
                list(job.catch_up())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in (tmp_path / "s" / "versions").iterdir()] == ["1"] and job.store.live == 1
    signal.signal(signal.SIGXFSZ, previous)
    list(job.catch_up())
    assert job.store.live == 2 and n_learned(job.bundle) == 1500 + SIZE


@pytest.mark.parametrize("model", ["popularity", "mf:d=8"])
def test_the_next_run_repeats_an_update_that_died_while_learning_or_saving(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, one, *_ = days()
    job = new_job(tmp_path / "s", base, model)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    places = ((challenger_module, "learn_with_holdout"), (job_module, "write_bundle"), (job_module, "_new_manifest"))
    for module, name in places:
        monkeypatch.setattr(module, name, die)
        with pytest.raises(KeyboardInterrupt):
            learn(job, one, "one")
        monkeypatch.undo()
        job = NightlyJob(open_store(tmp_path / "s"), ANY)
        assert job.store.live == 1 and waiting_batches(job.store, job.log) == [2]
        with job.store.locked():
            pass
    [version] = job.catch_up()
    assert version.id == 2 and job.store.live == 2 and len(job.log.read()) == 1500 + SIZE


def test_a_full_retrain_is_tried_at_intervals_and_its_gain_is_recorded(tmp_path: Path) -> None:
    base, *later = days()
    job = new_job(tmp_path / "s", base)
    job.full_every = "2"
    versions = [version for i, day in enumerate(later) for version in learn(job, day, f"day {i}")]
    assert [GAIN_KEY in version.numbers for version in versions] == [False, True, False, True]
    assert versions[1].numbers[GAIN_KEY] == 0  # counting all days at once equals counting day by day
    assert n_learned(job.bundle) == 1500 + 4 * SIZE
    chain = version_chain(job.store)
    assert updates_since_retrain(chain) == 0 and retrain_plan(chain)["last_full"].startswith(
        "version 5: ndcg@20 +0.0000"
    )
    # two full retrains without a gain double the interval twice
    assert retrain_interval("auto", chain[:1]) == 7 and retrain_interval("auto", chain) == 28
    better = chain[-1].model_copy(update={"numbers": {GAIN_KEY: 0.1, "full_low": 0.05}})
    assert retrain_interval("auto", [*chain, better]) == 14
    for wrong in ("0", "often", "-1", "1.5"):
        with pytest.raises(OptionError, match="a number of updates or auto"):
            retrain_interval(wrong, chain)


@pytest.mark.parametrize("model", ["mf:d=8", "comirec-dr:d=8", "blend"])
def test_a_full_retrain_can_be_updated_like_any_other_version(model: str, tmp_path: Path) -> None:
    base, one, two, three, _ = days()
    job = new_job(tmp_path / "s", base, model)
    job.full_every = "1"
    late = base[:1].with_columns(time=pl.col("time") + 1)
    for i, day in enumerate([pl.concat([late, one]), two, three]):
        [version] = learn(job, day, f"day {i}")
        assert GAIN_KEY in version.numbers and version.numbers["full_s"] > 0
        for catalog in (job.bundle.served.users, job.bundle.served.items):
            assert (catalog.frame["last_span"] >= catalog.frame["first_span"]).all()
    assert len(Recommender.load(tmp_path / "s").recommend(one["user_id"][:5].unique(), 5)) > 0
    Recommender("popularity").fit(base).save(tmp_path / "p")
    job = NightlyJob(open_store(tmp_path / "p"), ANY, "1")
    with pytest.raises(OptionError, match="the log lacks the events of version 1"):
        learn(job, one, "one")


POOL = days(5)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["deliver", "late", "again", "rollback", "kill"]), st.integers(0, 4)),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_is_delivered_in_whatever_order_is_counted_once(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int]]
) -> None:
    base, *later = POOL
    job = new_job(tmp_path_factory.mktemp("store") / "s", base)
    delivered = {(-1, i) for i in range(1500)}
    for action, n in actions:
        if action in ("deliver", "late", "kill"):
            rows = range(SIZE) if action == "deliver" else range(50 * n, SIZE, 3)
            frame = read_log(later[n][list(rows)]).frame
            result = job.append_delivery(read_log(later[n][list(rows)]), f"{action} {n}")
            delivered |= {(n, i) for i in rows}
            if action != "kill":
                list(job.catch_up())
                learned = job.log.read([m.batch for m in version_chain(job.store) if m.batch is not None])
                missing = frame.join(learned, on=["user_id", "item_id", "time"], how="anti")
                assert (
                    result.repeated_batch is not None or missing.is_empty()
                )  # whatever happened to earlier deliveries
        elif action == "rollback" and job.store.manifest(job.store.live).parent is not None:
            job.store.move_pointer(job.store.manifest(job.store.live).parent or 0, "rollback")
        job = NightlyJob(open_store(job.store.folder), ANY)
    list(job.catch_up())
    assert len(job.log.read()) == len(delivered) and job.log.read().is_unique().all()
    batches = [manifest.batch for manifest in version_chain(job.store)]
    assert len(set(batches)) == len(batches)
    assert n_learned(job.bundle) == len(job.log.read([batch for batch in batches if batch]))


def test_the_source_of_a_delivery_is_a_hash_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.parquet").write_text("x")
    assert hash_source(tmp_path / "a.parquet") == hash_source(tmp_path / "f")
    (tmp_path / "f" / "b.parquet").write_text("y")
    assert hash_source(tmp_path / "a.parquet") != hash_source(tmp_path / "f")


def crash(folder: Path, n_kills: int, commands: str) -> None:
    """Kill commands that change a store at random moments. The store must be intact after each kill."""
    base, *later = days(6)
    base.write_parquet(folder / "base.parquet")
    for i, day in enumerate(later):
        day.write_parquet(folder / f"day-{i}.parquet")
    at, source = ["--store", str(folder / "s")], np.random.default_rng(0)
    assert main(["fit", str(folder / "base.parquet"), *at, "--model", "popularity"]) == 0
    for kill in range(n_kills):
        process = crashing.start(folder, commands)
        time.sleep(source.exponential(0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was still running
        store = open_store(folder / "s")
        contents, batches = read_bundle(store.verified_files(store.live)), [m.batch for m in version_chain(store)]
        assert len(Recommender.from_bundle(contents).recommend(base["user_id"][:3].unique(), 3)) > 0
        log = NightlyJob(store).log
        assert len(set(batches)) == len(batches), kill
        if "erase" not in commands:  # erasing does not reduce counts that all users share
            assert n_learned(contents) == len(log.read([batch for batch in batches if batch]))
    # Days arrive in random order, so the gate may refuse what a kill left in the log. --force overrules it again.
    assert main(["update", *at, "--force", "--reason", "a test"]) == 0 and main(["doctor", *at]) == 0
    if commands == "update":
        store = open_store(folder / "s")
        assert NightlyJob(store).log.batches()["batch"].to_list() == [
            m.batch for m in version_chain(store)
        ]  # all of them, in order


@pytest.mark.parametrize("commands", ["update", "update,update,gc,rollback,promote", "update,erase"])
def test_kills_lose_nothing_and_count_nothing_twice(commands: str, tmp_path: Path) -> None:
    crash(tmp_path, 3, commands)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("n", "commands"), [(50, "update"), (200, "update,update,gc,rollback,promote"), (50, "update,erase")]
)
def test_many_kills_lose_nothing_and_count_nothing_twice(n: int, commands: str, tmp_path: Path) -> None:
    crash(tmp_path, n, commands)


def test_a_store_of_format_1_can_be_queried_and_updated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/gold/store-1 was written before manifests had a format. It has item-knn, 6 events and an update of 2."""
    shutil.copytree(Path(__file__).parent / "gold" / "store-1", tmp_path / "s")
    at = ["--store", str(tmp_path / "s")]
    assert main(["recommend", "u3", "u4", "-k", "3", *at, "--json"]) == 0
    found = [(row["user_id"], row["item_id"], row["score"]) for row in json.loads(capsys.readouterr().out)]
    assert found == [
        ("u3", "b", pytest.approx(0.23359641)),
        ("u4", "b", pytest.approx(0.14743863)),
        ("u4", "c", pytest.approx(0.14743863)),
    ]
    (tmp_path / "next.csv").write_text("user_id,item_id,timestamp\nu2,c,1767268920\n")
    assert main(["update", str(tmp_path / "next.csv"), *at, "--json"]) == 0
    [version] = json.loads(capsys.readouterr().out)
    assert (version["id"], version["parent"], version["format"], version["sizes"]["events"]) == (3, 2, 1, 9)
    assert main(["doctor", *at]) == 0 and main(["erase", "u1", *at]) == 0 and main(["rollback", "1", *at]) == 0


def test_a_store_that_python_saved_can_be_updated_by_the_nightly_job(tmp_path: Path) -> None:
    base, one, *_ = days()
    recommender = Recommender("popularity").fit(base)
    recommender.save(tmp_path / "s")
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    with pytest.raises(LogError, match="is not an integer"):
        job.append_delivery(read_log(one.with_columns(pl.col("user_id").cast(pl.String) + "x")), "text")
    [version] = learn(job, one, "one")
    with pytest.raises(OptionError, match="Save to another folder"):
        recommender.save(tmp_path / "s")
    assert (version.id, version.parent) == (2, 1) and n_learned(job.bundle) == 1500 + SIZE
    with pytest.raises(StateError, match="no version 9"):
        job.store.move_pointer(9, "promote")
