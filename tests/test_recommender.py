"""The Python interface: answers by hand and in worlds, the same numbers as a replay, saving and loading."""

from pathlib import Path

import polars as pl
import pytest
import torch
import torch.nn.functional as F

from freshrec.data.split import split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import FreshrecError, IncompatibleError, LogError, OptionError, StateError
from freshrec.learn.fit import FitConfig
from freshrec.models.mf import MF, MFSpec
from freshrec.nn.scoring import item_vectors
from freshrec.recommender import recommender as recommender_module
from freshrec.recommender.bundle import Bundle
from freshrec.recommender.explain import explain_by_vectors
from freshrec.recommender.recommender import Recommender
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.results import collect_results
from freshrec.replay.slices import slice_table
from freshrec.store.versions import open_store
from freshrec.strategies.baselines import FineTune
from freshrec.types import Batch

NOON = 1_767_268_800  # 2026-01-01, in seconds
# Counts: a 3, b 2, c 1. Unknown users get decayed popularity. Its half-life is one window, here one event (a sixth of
# six). So a has 1/32 + 1/16 + 1/2 = 0.59, b has 1/8 + 1/4 = 0.375, and c has 1 and comes first.
LOG = pl.DataFrame(
    {"user_id": ["u1", "u2", "u1", "u2", "u3", "u3"], "item_id": list("aabbac"), "timestamp": range(NOON, NOON + 6)}
)
WITHOUT_CLOCK = pl.DataFrame({"user_id": ["u1", "u2"], "item_id": ["a", "b"], "period": [1, 1], "order": [0, 1]})
FAST = "finetune:fit.base_epochs=1:fit.epochs=1"
WAYS = [
    ("popularity", None),
    ("item-knn", None),
    ("blend", None),
    ("mf:d=16", FAST),
    ("sasrec:d=16", FAST),
    ("comirec-dr:d=16", "imsr:fit.base_epochs=1:fit.epochs=1"),
    ("sasrec:d=16", "full:fit.base_epochs=1"),
]
each_way = pytest.mark.parametrize(("model", "strategy"), WAYS)


def days(world: str = "drift") -> tuple[pl.DataFrame, pl.DataFrame]:
    """A log of 3,000 events, and the next 1,000 events, with new users and items."""
    frame = make_world(world, users=200, items=80, events=4000).log.frame.select("user_id", "item_id", "time")
    return frame[:3000], frame[3000:]


def events(*pairs: str) -> pl.DataFrame:
    """events("u1 a", "u1 b") are two events later than LOG."""
    users, items = zip(*(pair.split() for pair in pairs))
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": range(NOON + 60, NOON + 60 + len(pairs))})


def items_of(found: pl.DataFrame) -> str:
    return "".join(found["item_id"])


def test_popular_items_by_hand() -> None:
    found = Recommender("popularity").fit(LOG).recommend(["u3", "u1"], k=2, exclude_seen=False)
    assert found.rows() == [
        ("u3", "a", 3.0, 1, None), ("u3", "b", 2.0, 2, None), ("u1", "a", 3.0, 1, None), ("u1", "b", 2.0, 2, None),
    ]  # fmt: skip
    assert found.columns == ["user_id", "item_id", "score", "rank", "fallback"]


def test_seen_items_are_left_out_however_old_they_are() -> None:
    recommender = Recommender("popularity:length=1").fit(LOG)  # the model itself keeps one event per user
    assert items_of(recommender.recommend("u1")) == "c"
    assert items_of(recommender.recommend("u3")) == "b"
    recommender.update(events("u1 c"))
    assert items_of(recommender.recommend("u1")) == ""  # nothing is left


def test_allowed_and_denied_items() -> None:
    recommender = Recommender("popularity").fit(LOG)
    assert items_of(recommender.recommend("u1", exclude_seen=False, allow=["c", "b", "new"])) == "bc"
    assert items_of(recommender.recommend("u1", exclude_seen=False, deny="a")) == "bc"
    assert items_of(recommender.recommend("u1", allow=["a", "c"], deny=["c"])) == ""  # a has been seen
    assert items_of(recommender.recommend("u1", exclude_seen=False, allow=[])) == ""


def test_an_unknown_user_gets_popular_items_with_the_reason() -> None:
    found = Recommender("sasrec:d=16", FAST).fit(LOG).recommend(["nobody", "u1"], k=3, exclude_seen=False)
    stranger, known = found.filter(pl.col("user_id") == "nobody"), found.filter(pl.col("user_id") == "u1")
    assert items_of(stranger) == "cab"
    assert stranger["score"].to_list() == pytest.approx([1, 0.59375, 0.375])
    assert stranger["fallback"].unique().to_list() == ["unknown user"]
    assert known["fallback"].unique().to_list() == [None]


def test_a_counting_model_without_scores_reports_the_fallback() -> None:
    # In item-knn, a is a neighbour of b and of c. A user with c alone gets a by score, and b by popularity.
    recommender = Recommender("item-knn").fit(LOG).update(events("u4 c"))
    found = recommender.recommend("u4", k=3)
    assert items_of(found) == "ab"
    assert found["fallback"].to_list() == [None, "no more items with a score"]
    assert found["rank"].to_list() == [1, 2]


def test_new_users_and_items_are_recommended_after_an_update() -> None:
    recommender = Recommender("popularity").fit(LOG).update(events(*["u9 new"] * 4))
    assert items_of(recommender.recommend("u1", k=1)) == "new"  # four events, the most of all items
    assert recommender.recommend("u9")["fallback"].unique().to_list() == [None]  # u9 is known now


def test_an_update_reads_its_rows_with_the_options_of_the_fit() -> None:
    ours = {"user_id": "who", "item_id": "what", "timestamp": "when"}
    log, new = LOG.rename(ours), events("u1 c").rename(ours)
    recommender = Recommender("popularity").fit(log, columns=ours).update(new)
    assert recommender.bundle.sizes == {"events": 7, "users": 3, "items": 3}


def test_exposures_are_not_learned() -> None:
    labelled = LOG.with_columns(label=pl.Series([1, 1, 1, 1, 1, 0]))
    assert Recommender("popularity").fit(labelled).bundle.sizes == {"events": 5, "users": 3, "items": 2}


def test_users_of_each_colour_get_items_of_their_colour() -> None:
    # In the checkerboard world, even users take only even items, and odd users only odd ones.
    old, new = days("checkerboard")
    for model, strategy in (("item-knn", None), ("sasrec:d=32", "finetune:fit.base_epochs=20:fit.epochs=1")):
        users = old["user_id"].unique()[:100]
        found = Recommender(model, strategy).fit(old).update(new).recommend(users, k=5, exclude_seen=False)
        assert (found["user_id"] % 2 == found["item_id"] % 2).mean() > 0.99


@each_way
def test_fit_and_evaluate_give_the_numbers_of_a_replay(model: str, strategy: str | None, tmp_path: Path) -> None:
    log = make_world("drift", users=200, items=80, events=4000).log
    parts = split_log(log, by="count", spans=1, targets="all", forget_users=0)
    n_base = len(parts.spans[0].events)
    recommender = Recommender(model, strategy).fit(log.frame[:n_base])
    found = recommender.evaluate(log.frame[n_base:])
    name, way = recommender.bundle.names
    cell = Cell(name, recommender.served.state.model.spec, way, recommender.bundle.strategy, 0)
    list(replay_cell(cell, parts, ReplaySettings(), tmp_path))
    results = collect_results([cell], slice_table(parts.spans), ["hr@20", "ndcg@20"], tmp_path)
    rows = results.filter((pl.col("span") == 1) & (pl.col("slice") == "all") & (pl.col("model") == name))
    expected = rows.filter(pl.col("metric").is_in(found["metric"].to_list()))
    assert found["value"].to_list() == pytest.approx(expected["value"].to_list(), abs=1e-12)
    assert found["n"].to_list() == expected["n"].to_list()


def test_a_new_item_of_the_user_can_be_predicted_again() -> None:
    recommender = Recommender("repeat-last").fit(LOG)
    found = recommender.evaluate(events("u1 new", "u1 new"))  # only the second event is predictable
    assert found.filter(pl.col("metric") == "hr@20")["value"].to_list() == [0.5]


def test_an_evaluation_by_hand() -> None:
    recommender = Recommender("popularity").fit(LOG)
    # The queries of u1 are a (rank 1) and c (rank 3), so hr@1 is 1/2. The first event of u9 is no query. The second,
    # a, has rank 1. The third is an unknown item and a miss, so hr@1 is 1/2 too.
    # mrr@3: u1 (1 + 1/3) / 2 = 2/3, u9 (1 + 0) / 2 = 1/2.
    found = recommender.evaluate(events("u1 a", "u9 b", "u1 c", "u9 a", "u9 new"), ["hr@1", "mrr@3"])
    assert found.select("metric", "n", "n_users").rows() == [("hr@1", 4, 2), ("mrr@3", 4, 2)]
    assert found["value"].to_list() == pytest.approx([1 / 2, (2 / 3 + 1 / 2) / 2])
    assert (found["low"] <= found["value"]).all()
    assert recommender.bundle.sizes == {"events": 6, "users": 3, "items": 3}  # the model did not change


@each_way
def test_a_loaded_recommender_answers_and_learns_like_the_saved_one(
    model: str, strategy: str | None, tmp_path: Path
) -> None:
    old, new = days()
    users = [*new["user_id"].unique()[:20], 10**9]
    recommender = Recommender(model, strategy).fit(old)
    recommender.save(tmp_path)
    loaded = Recommender.load(tmp_path)
    assert loaded.bundle.names == recommender.bundle.names
    assert loaded.recommend(users).equals(recommender.recommend(users))
    assert loaded.update(new).recommend(users).equals(recommender.update(new).recommend(users))


def test_an_interrupted_save_leaves_the_previous_version_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = Recommender("popularity").fit(LOG)
    recommender.save(tmp_path)

    def die(kept: Bundle, folder: Path) -> None:
        (folder / "served.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(recommender_module, "write_bundle", die)
    with pytest.raises(KeyboardInterrupt):
        recommender.update(events("u1 c")).save(tmp_path)
    monkeypatch.undo()
    assert Recommender.load(tmp_path).bundle.sizes["events"] == 6
    recommender.save(tmp_path)
    assert Recommender.load(tmp_path).bundle.sizes["events"] == 7
    assert sorted(path.name for path in tmp_path.glob("versions/*")) == ["1", "2"]


def test_lists_of_one_category(tmp_path: Path) -> None:
    log = LOG.with_columns(category=pl.Series([1, 1, 2, 2, 1, 2]))  # a 1, b 2, c 2
    recommender = Recommender("popularity").fit(log)
    assert items_of(recommender.recommend("stranger", category=2)) == "cb"
    assert items_of(recommender.recommend("stranger", category="1", allow=["a", "b"])) == "a"
    recommender.update(events("u1 b").with_columns(category=pl.lit(1))).save(tmp_path / "s")
    assert (
        items_of(Recommender.load(tmp_path / "s").recommend("stranger", category=1)) == "ba"
    )  # b has moved to category 1
    with pytest.raises(OptionError, match='No item has the category "9". Known categories: 1, 2'):
        recommender.recommend("u1", category=9)
    with pytest.raises(OptionError, match="the log has no category column"):
        Recommender("popularity").fit(LOG).recommend("u1", category=1)


def test_a_diverse_list_trades_score_for_other_categories() -> None:
    log = LOG.with_columns(category=pl.Series(["x", "x", "x", "x", "x", "y"]))  # counts: a 3 (x), b 2 (x), c 1 (y)
    recommender = Recommender("popularity").fit(log)

    def found(diversity: float, k: int = 3) -> tuple[str, list[float]]:
        frame = recommender.recommend("u3", k=k, exclude_seen=False, diversity=diversity)
        assert frame["rank"].to_list() == list(range(1, k + 1)) and frame["fallback"].null_count() == k
        return items_of(frame), frame["score"].to_list()

    assert found(0.5) == ("abc", [3, 2, 1])  # after a, b is worth 1.5
    assert found(1.5) == ("acb", [3, 1, 2])  # after a, b is worth 0.5
    assert found(1.5, k=2) == ("ac", [3, 1])  # c is not among the best two, but it is a candidate
    # An unknown user's list is diverse too. Popularity: c 1, a 0.59, b 0.375.
    assert items_of(recommender.recommend("stranger", diversity=0.5)) == "cab"
    log = log.with_columns(category=pl.Series(["y", "y", "x", "x", "y", "y"]))  # a and c share one: b 0.375 > a 0.09
    assert items_of(Recommender("popularity").fit(log).recommend("stranger", diversity=0.5)) == "cba"


def test_diversity_does_not_replace_scored_items_by_items_without_a_score() -> None:
    # In item-knn, a, b and c (category x) are neighbours of the items of u1. Item d (category y) has no neighbours.
    log = pl.concat([LOG, events("u5 d")]).with_columns(category=pl.Series(list("xxxxxxy")))
    found = Recommender("item-knn").fit(log).recommend("u1", k=2, exclude_seen=False, diversity=100)
    assert "d" not in items_of(found) and found["fallback"].to_list() == [None, None]


def test_a_folder_from_before_stores_is_read_and_saved_as_a_store(tmp_path: Path) -> None:
    older = Path(__file__).parent / "gold" / "recommender-2"
    recommender, fitted = Recommender.load(older), Recommender("item-knn").fit(LOG)
    assert recommender.recommend(["u1", "u3"]).equals(fitted.recommend(["u1", "u3"]))
    recommender.save(tmp_path / "new")
    again = Recommender.load(tmp_path / "new").update(events("u1 c"))
    assert again.recommend(["u1"]).equals(fitted.update(events("u1 c")).recommend(["u1"]))
    with pytest.raises(StateError, match=r"not a store but an older save.*Recommender.load\(folder\).save"):
        open_store(older)
    for text in ("{", '{"format": 9, "part": 1, "model": "", "strategy": ""}', "[]"):
        (tmp_path / "recommender.json").write_text(text)
        with pytest.raises(StateError, match="Fit again"):
            Recommender.load(tmp_path)


def test_each_interest_has_its_inner_product_rank_and_past_event() -> None:
    class Fake(MF):
        """Items 1 and 2 point in one direction, item 3 in another. Each has an interest; a third one is removed."""

        def __init__(self) -> None:
            super().__init__(MFSpec(d=2), 0)
            self.grow(1, 4)
            self.items.weights[1:] = torch.tensor([[1.0, 0.1], [3.0, 0.3], [0.1, 2.0], [0.5, 0.6]])

        def user_vectors(self, batch: Batch) -> torch.Tensor:
            return torch.tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])

    alive_BK = torch.tensor([[True, True, False]])
    batch = Batch(torch.tensor([1]), torch.tensor([[0, 3, 1]]), alive_BK=alive_BK)
    first, second = explain_by_vectors(Fake(), batch, 2)
    # Interest 1: 2 * 3.0, the largest of all items. Interest 2: 1 * 0.3, less than item 3 (2.0) and item 4 (0.6).
    assert (first.source, first.rank, first.contribution, first.history_item) == ("interest 1 of 2", 1, 6.0, 1)
    assert (second.source, second.rank, second.history_item) == ("interest 2 of 2", 3, 3)
    assert second.contribution == pytest.approx(0.3)
    # For item 4, the larger inner product comes first: 2 * 0.5 > 1 * 0.6.
    assert [reason.source for reason in explain_by_vectors(Fake(), batch, 4)] == ["interest 1 of 2", "interest 2 of 2"]


@pytest.mark.parametrize("model", ["comirec-dr:d=16:k=3", "sasrec:d=16", "mf:d=16", "item-knn"])
def test_the_first_reason_has_the_score_as_points(model: str) -> None:
    recommender = Recommender(model, None if model == "item-knn" else FAST).fit(days()[0])
    for user, item, score, *_ in recommender.recommend(days()[0]["user_id"][:3].to_list(), k=2).iter_rows():
        reasons = recommender.explain(user, item)
        assert reasons["points"][0] == pytest.approx(score, rel=1e-5)
        mine = recommender.served.items.rows(reasons["because"].drop_nulls())
        assert bool((mine > 0).all()) and len(mine)


def test_similar_items_of_item_knn_are_its_neighbours() -> None:
    recommender = Recommender("item-knn").fit(LOG)
    assert recommender.similar_items("b")["similar_id"].to_list() == ["a"]
    # a occurs with b in two histories and with c in one.
    assert recommender.similar_items(["a"], k=2).select("item_id", "similar_id", "rank").rows() == [
        ("a", "b", 1), ("a", "c", 2),
    ]  # fmt: skip


def test_similar_items_of_a_model_with_vectors_are_the_nearest_by_cosine() -> None:
    recommender = Recommender("sasrec:d=16", FAST).fit(days()[0])
    served = recommender.served
    vectors_ID = F.normalize(item_vectors(served.state.model)[1:].double(), dim=1)
    cosines = (vectors_ID @ vectors_ID[4]).index_fill(0, torch.tensor([4]), -2)  # of row 5, without itself
    item = served.items.ids(torch.tensor([5]))[0]
    found = recommender.similar_items([item], k=3)
    expected = cosines.topk(3)
    assert found["similar_id"].to_list() == served.items.ids(expected.indices + 1).to_list()
    assert found["score"].to_list() == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_ids_given_as_text_find_integers() -> None:
    recommender = Recommender("popularity").fit(days()[0])
    assert recommender.recommend(["3", "5"]).equals(recommender.recommend([3, 5]))


def test_models_and_strategies_can_be_custom_instances() -> None:
    recommender = Recommender(MFSpec(d=8), FineTune(FitConfig(epochs=1, base_epochs=1)), seed=3).fit(LOG)
    # the names that would make them, because class names may change
    assert recommender.bundle.names == ("mf:d=8", "finetune:fit.epochs=1:fit.base_epochs=1")
    assert len(recommender.recommend("u1", exclude_seen=False)) == 3


def test_partial_fit_is_update() -> None:
    assert Recommender.partial_fit is Recommender.update
    assert Recommender.update.__doc__ is not None
    assert "only the new rows are needed" in Recommender.update.__doc__.partition("\n")[0]


ERRORS = [
    (lambda r: Recommender("popularity").recommend("u1"), StateError, r"Call fit\(log\)"),
    (lambda r: Recommender("poplarity"), OptionError, 'Did you mean "popularity"'),
    (lambda r: Recommender("popularity", "finetune"), IncompatibleError, "Use strategy absorb"),
    (lambda r: r.recommend("u1", k=0), OptionError, "k is 0"),
    (lambda r: r.recommend("u1", k="3"), OptionError, "k is 3, but must be an integer"),
    (lambda r: r.recommend("u1", diversity=-1.0), OptionError, "diversity .* must be at least 0"),
    (lambda r: r.recommend("u1", diversity=0.5), OptionError, "diversity needs categories, .* Use diversity 0"),
    (lambda r: r.recommend(["u1", True]), LogError, 'user_id "True" is neither text nor a whole number'),
    (lambda r: Recommender("popularity").fit(days()[0]).recommend("x"), LogError, "not an integer"),
    (lambda r: r.similar_items("z"), OptionError, 'There is no item "z"'),
    (lambda r: r.similar_items("a"), IncompatibleError, "Use item-knn"),
    (lambda r: r.explain("z", "a"), OptionError, 'There is no user "z"'),
    (lambda r: r.explain(["u1", "u2"], "a"), OptionError, "one user id and one item id"),
    (lambda r: r.explain("u1", "z"), OptionError, 'There is no item "z"'),
    (lambda r: r.evaluate(events("u9 a")), LogError, "nothing can be measured"),
    (lambda r: r.evaluate(LOG, ["ndgc@20"]), OptionError, 'Did you mean "ndcg"'),
    (lambda r: r.update(LOG.head(0)), LogError, "no rows"),
    (lambda r: r.update(LOG), LogError, "5 of 6 rows are older than 2026-01-01T12:00:05.*12:00:00. Drop .*fit again"),
    (lambda r: r.evaluate(LOG.head(1)), LogError, "1 of 1 rows"),
    (lambda r: r.update(WITHOUT_CLOCK), LogError, "had timestamps, but the new events have none"),
]


def test_events_without_timestamps_follow_the_learned_ones() -> None:
    recommender = Recommender("popularity").fit(WITHOUT_CLOCK).update(WITHOUT_CLOCK).update(WITHOUT_CLOCK)
    recent = recommender.served.counts.histories
    assert recent.items_R.tolist() == [1, 1, 1, 2, 2, 2]
    # Each file has the orders 0 and 1. After three files, positions run from 0 to 5.
    assert recent.times_R.tolist() == [0, 2, 4, 1, 3, 5]


def test_an_event_at_the_time_of_the_newest_one_is_not_late() -> None:
    newest = LOG.tail(1)
    recommender = Recommender("popularity").fit(LOG).update(newest.with_columns(item_id=pl.lit("a")))
    assert recommender.bundle.sizes["events"] == 7
    assert recommender.update(newest).bundle.sizes["events"] == 7  # it is learned already


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_an_error_says_what_is_wrong(call: object, error: type[FreshrecError], message: str) -> None:
    recommender = Recommender("popularity").fit(LOG)
    with pytest.raises(error, match=message):
        call(recommender)  # type: ignore[operator]


def test_a_folder_without_a_store_is_neither_read_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="is not empty"):
        Recommender("popularity").fit(LOG).save(tmp_path)
    with pytest.raises(StateError, match="There is no store"):
        Recommender.load(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "store.json",
        "live.json",
        "versions/1/manifest.json",
        "versions/1/served.safetensors",
        "versions/1/users.parquet",
    ],
)
def test_a_damaged_file_is_an_error(file: str, tmp_path: Path) -> None:
    Recommender("popularity").fit(LOG).save(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError):
        Recommender.load(tmp_path)
