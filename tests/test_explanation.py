"""Explanations and profiles in sentences: contributions add up to the printed total, and the text names no raw keys."""

import json
import re
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path

import polars as pl
import pytest
import torch

from freshrec.cli.app import main
from freshrec.data.synthetic import make_world
from freshrec.models import MODELS
from freshrec.models.blend.model import Blend, Reason
from freshrec.models.blend.rule import SCORE_SOURCES
from freshrec.recommender.bundle import learn_events
from freshrec.recommender.explanation import (
    EXPERT_LABELS,
    Contribution,
    Explanation,
    ScoredItem,
    _split_score,
    explain_pair,
    explanation_text,
)
from freshrec.recommender.ids import rows_of_pair
from freshrec.recommender.lists import user_batch
from freshrec.recommender.log_reading import encode_events
from freshrec.recommender.profile_text import user_text
from freshrec.recommender.recommender import Recommender
from freshrec.recommender.user_profile import PastEvent, profile_of

near = pytest.approx
NOON = 1_767_268_800  # 2026-01-01T12:00:00 UTC, in seconds
FAST = "finetune:fit.base_epochs=1:fit.epochs=1"
LOG = pl.DataFrame(
    {"user_id": ["u1", "u2", "u1", "u2", "u3", "u3"], "item_id": list("aabbac"), "timestamp": range(NOON, NOON + 6)}
)
COUNTING = ("popularity", "repeat-last", "item-knn", "markov", "user-knn", "sknn", "s-sknn", "v-sknn", "stan")
SPLIT_BY_EVENT = ("item-knn", "markov", "repeat-last", "repeat-last:order=freq")


def days() -> pl.DataFrame:
    return make_world("drift", users=60, items=40, events=1500).log.frame.select("user_id", "item_id", "time")


@cache
def fitted(model: str) -> Recommender:
    """A recommender on the log `days`; shared by tests, which must not change it."""
    is_counting = model in COUNTING or model.startswith(("popularity", "repeat"))
    return Recommender(model, None if is_counting or model == "blend" else FAST).fit(days())


def explained(recommender: Recommender, user: object, item: object) -> Explanation:
    bundle = recommender.bundle
    return explain_pair(bundle.served, user, item, bundle.names[0], bundle.read_options.has_clock)  # type: ignore[arg-type]


def printed_contributions(text: str) -> tuple[list[Decimal], Decimal]:
    """The numbers of the table, and its total."""
    rows = re.findall(r"^ *([+-]\d+\.\d+)  (.*)$", text, flags=re.M)
    assert rows[-1][1] == "total"
    return [Decimal(value) for value, _ in rows[:-1]], Decimal(rows[-1][0])


def check_table(text: str) -> None:
    """The printed numbers sum to the printed total exactly."""
    values, total = printed_contributions(text)
    assert sum(values) == total


def first_item(recommender: Recommender, user: object) -> tuple[object, float]:
    [row] = recommender.recommend([user], k=1).rows(named=True)  # type: ignore[list-item]
    return row["item_id"], row["score"]


def test_contributions_of_a_blend_add_up_to_the_log_of_the_score_above_its_mean() -> None:
    recommender = Recommender("blend").fit(days())
    user = days()["user_id"][0]
    item, score = first_item(recommender, user)
    found, model = explained(recommender, user, item), recommender.served.state.model
    assert isinstance(model, Blend) and model.active_rule is not None
    row = recommender.served.users.rows(pl.Series([user]))
    items_BC, score_BC = model.candidates(user_batch(recommender.served, row))
    log_C = score_BC[0, items_BC[0] > 0].double().log()
    expected = torch.tensor(score, dtype=torch.float64).log() - log_C.mean()  # what the sentence says
    assert found.total == near(expected.item(), abs=1e-3) and found.score == near(score)
    assert len(found.contributions) == len(SCORE_SOURCES)
    text = explanation_text(found)
    check_table(text)
    text = " ".join(text.split())
    assert f"{len(log_C)} candidates sum to 1" in text and f"add up to {found.total:+.2f}" in text


def test_printed_contributions_of_a_blend_add_up_for_every_item() -> None:
    recommender, user = fitted("blend"), days()["user_id"][0]
    for item in recommender.recommend([user], k=20, exclude_seen=False)["item_id"]:
        found = explained(recommender, user, item)
        if found.contributions:
            text = explanation_text(found)
            check_table(text)
            assert float(printed_contributions(text)[1]) == near(found.total, abs=0.00501)


def test_rounded_contributions_add_up_to_the_rounded_total() -> None:
    # Three thirds of 1 have 33.3 hundredths each. One of them is rounded up, so that they sum to 100; a 0 stays 0.
    parts = tuple(Contribution(name, value) for name, value in (("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3), ("d", 0.0)))
    text = explanation_text(Explanation("u", "i", 1.0, 1, 2, 0, parts, "About."))
    values, total = printed_contributions(text)
    assert sorted(map(str, values)) == ["0.000", "0.333", "0.333", "0.334"] and str(total) == "1.000"
    # -0.125 - 0.125 = -0.25 in hundredths: -12.5 - 12.5 = -25. One is rounded up to -12, the other down to -13.
    parts = (Contribution("x", 2.0), Contribution("a", -0.125), Contribution("b", -0.125))
    values, total = printed_contributions(explanation_text(Explanation("u", "i", 1.0, 1, 2, 0, parts, "About.")))
    assert sorted(map(str, values)) == ["-0.12", "-0.13", "2.00"] and str(total) == "1.75"


def test_the_one_expert_of_a_blend_without_a_rule_has_the_whole_score() -> None:
    recommender = Recommender("blend").fit(LOG)  # six events: too few queries for a rule
    item, score = first_item(recommender, "u3")
    found = explained(recommender, "u3", item)
    assert found.total == found.score == near(score) and "One expert ranks alone" in found.about


@pytest.mark.parametrize("model", SPLIT_BY_EVENT)
def test_contributions_of_past_events_add_up_to_the_score(model: str) -> None:
    recommender = Recommender(model).fit(days())
    for user in days()["user_id"].unique()[:5].to_list():
        [row] = recommender.recommend([user], k=1, exclude_seen=False).rows(named=True)
        found = explained(recommender, user, row["item_id"])
        assert found.total == near(row["score"], rel=1e-5) and found.score == near(row["score"])
        if len(found.contributions) > 1:
            check_table(explanation_text(found))


def test_past_events_of_item_knn_by_hand() -> None:
    # u2 had a, then b. c stands in one history with a, in none with b: the event with a has all of the score.
    found = explained(Recommender("item-knn").fit(LOG), "u2", "c")
    assert [part.value for part in found.contributions] == [near(found.score)]
    assert "Most important past event: item a on 2026-01-01, the largest contribution." in explanation_text(found)


def test_the_most_important_event_of_item_knn_has_the_largest_single_contribution_in_every_answer() -> None:
    # v had a, a, a, then b. Each of ten users had a and c, and each of twelve had b and c. The newest event, with b,
    # weighs most: 12 pairs at age 0, against 10 x 0.85 for the newest a. The three events with a weigh more together,
    # but each of them is one past event: 0.85 > 0.85^2 > 0.85^3.
    pairs = [(f"a{n}", item) for n in range(10) for item in "ac"] + [
        (f"b{n}", item) for n in range(12) for item in "bc"
    ]
    rows = [*pairs, ("v", "a"), ("v", "a"), ("v", "a"), ("v", "b")]
    log = pl.DataFrame(rows, ["user_id", "item_id"], orient="row").with_columns(timestamp=NOON + pl.int_range(pl.len()))
    recommender = Recommender("item-knn").fit(log)
    found = explained(recommender, "v", "c")
    events = [part.event for part in found.contributions if part.event]
    assert [event.item_id for event in events] == ["b", "a", "a", "a"]
    assert [event.at[18] for event in events] == ["7", "6", "5", "4"]  # 44 rows come before: 12:00:44 to 12:00:47
    assert found.contributions[2].value / found.contributions[1].value == near(0.85) and found.total == near(
        found.score
    )
    assert recommender.explain("v", "c")["because"].to_list() == ["b"]
    row = int(recommender.served.users.rows(pl.Series(["v"])))
    assert [interest.title for interest in profile_of(recommender.served, row, True).interests] == ["because of item b"]


@pytest.mark.parametrize("model", ["item-knn", "markov"])
def test_text_and_json_name_the_same_most_important_item(model: str) -> None:
    recommender = fitted(model)
    for user, item, *_, fallback in recommender.recommend(days()["user_id"].unique()[:20], k=5).iter_rows():
        if fallback is None:
            first = explained(recommender, user, item).contributions[0].event
            assert first is not None and [first.item_id] == recommender.explain(user, item)["because"].to_list()


@pytest.mark.parametrize("model", ["comirec-dr:d=16:k=3", "mind:d=16", "sasrec:d=16", "mf:d=16"])
def test_the_largest_inner_product_is_the_score_and_the_others_contribute_nothing(model: str) -> None:
    recommender = Recommender(model, FAST).fit(days())
    user = days()["user_id"][0]
    item, score = first_item(recommender, user)
    found = explained(recommender, user, item)
    assert found.total == near(score, rel=1e-5) and found.score == near(score, rel=1e-5)
    assert sum(part.value != 0 for part in found.contributions) == 1
    if len(found.contributions) > 1:
        check_table(explanation_text(found))
        assert f"one of the user's {len(found.contributions)} interests" in found.about


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("blend", *SPLIT_BY_EVENT)])
def test_every_model_explains_its_first_item_with_the_rank_that_it_has_in_the_list(model: str) -> None:
    recommender, user = fitted(model), days()["user_id"][0]
    [*_, row] = recommender.recommend([user], k=3).rows(named=True)
    found = explained(recommender, user, row["item_id"])
    text = explanation_text(found)
    if row["fallback"] is None:
        assert (found.rank, found.score) == (row["rank"], near(row["score"], rel=1e-4, abs=1e-6))
    assert bool(found.contributions) != (f"cannot split a score of {model} into contributions." in text)
    assert not found.contributions or found.total == near(found.score, rel=1e-5)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("model", MODELS)
def test_ranks_equal_those_of_the_list_of_all_items(model: str) -> None:
    recommender, n_items = fitted(model), days()["item_id"].n_unique()
    for user in days()["user_id"].unique(maintain_order=True)[:3].to_list():
        own = set(days().filter(user_id=user)["item_id"])
        new, every = (recommender.recommend([user], n_items, is_new).rows(named=True) for is_new in (True, False))
        rows = [*new[:1], *new[len(new) // 2 :][:2], *new[-2:], *[row for row in every if row["item_id"] in own][-2:]]
        for row in rows:  # 3 users x up to 7 items: the first, middle and last new ones, and the last own ones
            found = explained(recommender, user, row["item_id"])
            n_ranked = len(every) if row["item_id"] in own else len(new)
            assert (found.rank, found.n_ranked) == (row["rank"], n_ranked)
            assert found.score == near(row["score"], rel=1e-5) and "not offered" not in explanation_text(found)


def test_the_most_important_past_event_of_a_blend_has_the_largest_contribution_of_either_sign() -> None:
    near_zero, large = (PastEvent(name, 7) for name in ("tiny", "large"))
    parts = (
        Contribution("popularity", 3.0),
        Contribution("markov", 0.01, None, near_zero, ", the largest part of markov"),
        Contribution("item-knn", -1.5, None, large, ", the largest part of item-knn"),
    )
    text = " ".join(explanation_text(Explanation("u", "i", 0.5, 1, 2, 0, parts, "About.")).split())
    assert text.endswith(
        "Most important past event: item large at position 7, the largest part of item-knn. This contribution is "
        "negative, so it lowers the score."
    )
    raised = replace(parts[2], value=1.5)
    text = " ".join(explanation_text(Explanation("u", "i", 0.5, 1, 2, 0, (*parts[:2], raised), "About.")).split())
    assert text.endswith("Most important past event: item large at position 7, the largest part of item-knn.")


def test_popularity_says_what_it_counts() -> None:
    found = explained(Recommender("popularity").fit(LOG), "u1", "c")
    assert explanation_text(found) == (
        "Item c is ranked 1 of the only item that can be ranked for user u1 (score 1, higher is better).\n"
        "Items that the user already has are not ranked.\n\n"
        "The score is the number of events of the item (all events). It is the same for every user."
    )
    seen = explanation_text(explained(Recommender("popularity").fit(LOG), "u1", "b"))
    assert "ranked 2 of the 3 items that can be ranked" in " ".join(
        seen.split()
    ) and "already has this item (1 event)" in " ".join(seen.split())


def test_an_item_without_a_score_has_the_rank_of_the_popular_items_that_complete_the_list() -> None:
    # u1 had a and b, so the list without own items holds only c, which repeat-last does not score.
    recommender = Recommender("repeat-last").fit(LOG)
    [row] = recommender.recommend("u1", k=5).rows(named=True)
    assert (row["item_id"], row["rank"], row["fallback"]) == ("c", 1, "no more items with a score")
    text = " ".join(explanation_text(explained(recommender, "u1", "c")).split())
    assert (
        text.startswith("Item c is ranked 1 of the only item that can be ranked for user u1")
        and f"score {row['score']:.4g}," in text
    )
    assert "repeat-last scores it 0, which means that the model has no opinion. Popular items complete a list" in text
    blend = Recommender("blend:items_per_expert=1").fit(days())  # its experts propose few of the 40 items
    user = days()["user_id"][0]
    others = [item for item in days()["item_id"].unique() if not explained(blend, user, item).contributions]
    text = " ".join(explanation_text(explained(blend, user, others[0])).split())
    assert re.search(r"The blend scores \d+ candidates for this user: the best item of each expert", text)


def test_an_item_that_a_trained_model_has_not_learned_yet_is_ranked_among_the_popular_ones() -> None:
    bundle = Recommender("mf:d=8", FAST).fit(LOG).bundle
    late = LOG.select("user_id", time=pl.lit((NOON + 60) * 10**6), item_id=pl.lit("new"))
    pending = learn_events(
        bundle, encode_events(bundle.served, late), n_learned=0
    )  # as events are that a night held out
    text = " ".join(explanation_text(explain_pair(pending.served, "u1", "new", "mf:d=8", True)).split())
    # u1 already has it, so it is ranked among all four items; mf scores the three others.
    assert text.startswith("Item new is ranked 4 of the 4 items that can be ranked for user u1")
    assert "It is newer than the last update of mf:d=8" in text


def test_every_source_of_a_blend_has_a_label() -> None:
    assert {name for name in SCORE_SOURCES if not name.startswith("popularity-")} <= EXPERT_LABELS.keys()


def test_a_log_without_timestamps_has_positions_for_dates() -> None:
    log = pl.DataFrame({"user_id": ["u", "u", "v", "v", "w"], "item_id": list("abaca"), "order": range(5), "period": 1})
    text = explanation_text(explained(Recommender("item-knn").fit(log), "w", "b"))
    assert "Most important past event: item a at position 4" in text


@pytest.fixture
def store(tmp_path: Path) -> str:
    days().write_parquet(tmp_path / "log.parquet")
    return str(tmp_path / "store")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", ["blend", "comirec-dr:d=8", "sasrec:d=8", "popularity"])
def test_inspect_reads_well_and_fits_100_columns(
    model: str, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    options = ("--strategy", FAST) if ":" in model else ()
    answer(capsys, "fit", str(tmp_path / "log.parquet"), "--store", store, "--model", model, *options)
    user, item = days()["user_id"][0], days()["item_id"][0]
    n_events = len(days().filter(user_id=user))
    of_user = answer(capsys, "inspect", "user", str(user), "--store", store)
    of_item = answer(capsys, "inspect", "item", str(item), "--store", store)
    assert of_user.startswith(f"User {user} has {n_events} events: learned by version 1.")
    assert f"The {min(20, n_events)} most recent events, newest last:" in of_user or "All events" in of_user
    assert of_item.startswith(f"Item {item} has {len(days().filter(item_id=item))} events from ")
    assert ("An interest is a vector for one part of what the user likes." in of_user) == model.startswith("comirec")
    assert ("Interests: this model has none." in of_user) == (model == "popularity")
    for text in (of_user, of_item):
        assert "_" not in text and "None" not in text and max(map(len, text.splitlines())) <= 100


def test_an_unknown_user_or_item_is_named_and_the_exit_code_is_that_of_a_wrong_argument(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, "fit", str(tmp_path / "log.parquet"), "--store", store, "--model", "popularity")
    user, item = (str(days()[name][0]) for name in ("user_id", "item_id"))
    for arguments, error in (
        ((user, "987654"), 'error: There is no item "987654". Check the id.\n'),
        (("987654", item), 'error: There is no user "987654". Check the id.\n'),
        (("Ann", item), 'error: user_id "Ann" is not an integer, but all ids of this log are. Pass an integer.\n'),
    ):
        assert main(["explain", *arguments, "--store", store]) == 2
        assert capsys.readouterr().err == error


def test_ids_with_line_separators_are_printed_on_one_line_and_as_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    names = {"u1": "u\u20281", "a": "a\u2028b", "c": "c\u2029d"}
    LOG.with_columns(pl.col("user_id", "item_id").replace(names)).write_parquet(tmp_path / "log.parquet")
    at = str(tmp_path / "store")
    answer(capsys, "fit", str(tmp_path / "log.parquet"), "--store", at, "--model", "item-knn")
    of_user = answer(capsys, "inspect", "user", "u\u20281", "--store", at)
    assert of_user.startswith(r"User 'u\u20281' has 2 events") and r"2026-01-01 12:00  'a\u2028b'" in of_user
    assert r"Because of item 'a\u2028b'" in of_user and r"best items: 'c\u2029d'" in of_user
    assert r"supported by past events: 'a\u2028b' on 2026-01-01" in of_user
    assert answer(capsys, "inspect", "item", "a\u2028b", "--store", at).startswith(
        r"Item 'a\u2028b' has 3 events from 3 users"
    )
    text = " ".join(answer(capsys, "explain", "u\u20281", "c\u2029d", "--store", at).split())
    assert text.startswith(r"Item 'c\u2029d' is ranked 1 of the only item that can be ranked for user 'u\u20281'")
    assert r"Most important past event: item 'a\u2028b' on 2026-01-01" in text
    [reason] = json.loads(answer(capsys, "explain", "u\u20281", "c\u2029d", "--store", at, "--json"))
    assert reason["because"] == "a\u2028b"  # JSON has its own escapes


def test_inspect_names_the_versions_that_learned_the_first_and_the_last_event(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, "fit", str(tmp_path / "log.parquet"), "--store", store, "--model", "popularity")
    user, item = days()["user_id"][0], days()["item_id"][0]
    new = pl.DataFrame({"user_id": [user], "item_id": [item], "time": [days()["time"].max() + 10**6]})  # type: ignore[operator]
    new.write_parquet(tmp_path / "new.parquet")
    force = ("--force", "--reason", "one row is no normal day")
    answer(capsys, "update", str(tmp_path / "new.parquet"), "--store", store, *force)
    told = " ".join(answer(capsys, "inspect", "user", str(user), "--store", store).split())
    assert "the first learned by version 1, the last by version 2." in told
    assert "the first learned by version 1, the last by version 2." in " ".join(
        answer(capsys, "inspect", "item", str(item), "--store", store).split()
    )
    old = answer(capsys, "inspect", "user", str(user), "--store", store, "--version", "1")
    assert "learned by version 1." in old
    (Path(store) / "versions" / "1" / "manifest.json").write_text("damaged")
    told = " ".join(answer(capsys, "inspect", "user", str(user), "--store", store).split())
    assert "the first learned by the fit, the last by version 2." in told  # inspect needs version 2 only


def test_a_profile_counts_repeated_items_and_names_updates_without_a_version() -> None:
    events = [{"item_id": name, "at": "2026-01-01T12:00"} for name in (7, 12, 7, 7)]
    interest = {"title": "interest 1", "born_span": 0, "used_span": 3, "items": [7], "events": events}
    found = {"user_id": 1, "first_span": 0, "last_span": 3, "n_events": 4, "events": events, "kind": "interests"}
    text = user_text(found | {"interests": [interest]}, {3: 5})  # span 3 was learned by version 5; span 0 has none
    assert "User 1 has 4 events: the first learned by the fit, the last by version 5." in text
    assert "Interest 1: created by the fit, last used by version 5" in text
    assert "supported by past events: 7 (3 times), 12 on 2026-01-01" in text


def test_lists_say_how_their_scores_compare(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "fit", str(tmp_path / "log.parquet"), "--store", store, "--model", "item-knn")
    user, item = (str(days()[name][0]) for name in ("user_id", "item_id"))
    for command in (("recommend", user), ("similar", item)):
        text = answer(capsys, *command, "--store", store)
        assert text.endswith("\nScores compare within one list only; higher is better.\n")
        assert "Scores" not in answer(capsys, *command, "--store", store, "--json")


def test_the_usage_of_inspect_shows_the_two_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert "inspect [OPTIONS] {user|item} {ID}" in " ".join(answer(capsys, "inspect", "--help").split())


def test_a_number_that_rounds_to_zero_is_not_negative() -> None:
    parts = (Contribution("a", 5.0), Contribution("b", -0.001))  # -0.001 has its own line, rounded to two decimals
    table = explanation_text(Explanation("u", "i", 1.0, 1, 3, 0, parts, "About."))
    assert "+0.00  1 smaller contribution" in table and "-0.00" not in table


def test_an_interest_of_zeros_has_no_rank() -> None:
    recommender = Recommender("comirec-dr:d=8", FAST).fit(days())
    user = days()["user_id"][0]
    item, _ = first_item(recommender, user)
    served = recommender.bundle.served
    users_1, row = rows_of_pair(served, user, item)  # type: ignore[arg-type]
    reasons = [Reason("interest 1 of 2", 3, 2.0, 0), Reason("interest 2 of 2", 1, 0.0, 0)]
    model = served.current_state.model
    parts, about = _split_score(ScoredItem(model, user_batch(served, users_1), row, 2.0, reasons, {}), "comirec-dr")
    assert [part.rank for part in parts] == [3, None]  # 0 for every item, so all of them would be first
    assert "it is empty if the inner product is 0" in about


def test_a_blend_says_that_an_item_is_older_than_the_events_that_its_experts_read() -> None:
    # The blend reads a user's last 2 events here. The first item of each user with 3 different ones is older.
    log = days()
    user = log["user_id"][0]
    recommender = Recommender("blend:length=2").fit(log)
    items = log.filter(user_id=user).sort("time")["item_id"].to_list()
    old = [item for item in dict.fromkeys(items) if item not in items[-2:]]
    texts = [" ".join(explanation_text(explained(recommender, user, item)).split()) for item in old]
    scored = [text for text in texts if "is ranked" in text and "contributions add up" in text]
    assert scored and all("The experts read the user's last 2 events only." in text for text in scored)
    recent = " ".join(explanation_text(explained(recommender, user, items[-1])).split())
    assert "The experts read" not in recent


def test_inspect_counts_the_events_of_refused_deliveries(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(capsys, "fit", str(tmp_path / "log.parquet"), "--store", store, "--model", "popularity")
    user, item = days()["user_id"][0], days()["item_id"][0]
    late = days()["time"].max() + 400 * 86_400 * 10**6  # type: ignore[operator]  # 400 days after the log: refused
    new = pl.DataFrame({"user_id": [user] * 2, "item_id": [item, item + 1], "time": [late, late + 10**6]})
    new.write_parquet(tmp_path / "new.parquet")
    assert "Not counted" not in answer(capsys, "inspect", "user", str(user), "--store", store)
    assert main(["update", str(tmp_path / "new.parquet"), "--store", store]) == 8
    capsys.readouterr()
    of_user = answer(capsys, "inspect", "user", str(user), "--store", store)
    assert of_user.endswith("\nNot counted: 2 events in refused deliveries.\n")
    of_item = answer(capsys, "inspect", "item", str(item), "--store", store)
    assert of_item.endswith("\nNot counted: 1 event in refused deliveries.\n")
    answer(capsys, "update", "--retry", "2", "--store", store, "--force", "--reason", "the dates are right")
    assert "Not counted" not in answer(capsys, "inspect", "user", str(user), "--store", store)
