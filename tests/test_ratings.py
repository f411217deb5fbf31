"""Ratings and weights: --min-rating selects rows by them, and nothing else uses them."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from freshrec.cli import app
from freshrec.cli.replay import resolve_recipe
from freshrec.data.log import read_log
from freshrec.errors import LogError, NoRowsError, OptionError
from freshrec.recommender.recommender import Recommender
from freshrec.replay.recipe_schema import Recipe, load_recipe, save_recipe
from freshrec.replay.recipes import load_log
from freshrec.store.event_log import EventLog

NOON = 1_600_000_000  # 2020-09-13 12:26:40 UTC, in seconds
RATINGS = [5.0, 3.0, 4.0]


def rated(name: str = "rating", ratings: object = RATINGS) -> pl.DataFrame:
    times = [NOON, NOON + 1, NOON + 2]
    return pl.DataFrame({"user_id": [1, 2, 3], "item_id": [1, 2, 3], "timestamp": times, name: ratings})


def test_a_weight_is_refused_and_the_message_names_two_ways_out() -> None:
    with pytest.raises(LogError, match='a column "weight", but no model uses weights. Pass --min-rating X .* or --'):
        read_log(rated("weight"))
    with pytest.raises(LogError, match='a column "stars", but no model uses weights'):
        read_log(rated("stars"), columns={"weight": "stars"})
    assert read_log(rated("weight"), min_rating=4).frame["user_id"].to_list() == [1, 3]
    assert read_log(rated("weight"), columns={"rating": "weight"}).frame["user_id"].to_list() == [1, 2, 3]


@pytest.mark.parametrize(
    ("frame", "columns"),
    [
        (rated(), {}),
        (rated("weight"), {}),
        (rated("stars"), {"rating": "stars"}),
        (rated(ratings=["5", "3", "4"]), {}),
        (rated().with_columns(weight=pl.Series([1, 9, 1])), {}),  # the rating decides
    ],
    ids=["rating", "weight", "another name", "text", "rating and weight"],
)
def test_rows_below_the_lowest_rating_are_left_out_with_a_note(frame: pl.DataFrame, columns: dict[str, str]) -> None:
    log = read_log(frame, columns=columns, min_rating=4)
    assert log.frame["user_id"].to_list() == [1, 3]  # ratings 5 and 4
    assert log.frame.columns == ["user_id", "item_id", "time"]
    assert log.notes[-1] == "Left out 1 row with a rating below 4."


def test_a_rating_that_is_not_used_is_noted() -> None:
    log = read_log(rated())
    assert len(log.frame) == 3
    assert log.notes[-1] == 'Column "rating" is not used. --min-rating X keeps only the rows with at least X.'


def test_rows_without_a_rating_are_bad_and_rows_below_it_are_not_checked(tmp_path: Path) -> None:
    frame = rated(ratings=["5", None, "good"])
    assert len(read_log(frame).frame) == 3  # nobody needs the rating
    with pytest.raises(LogError, match="2 of 3 rows cannot be used: rating is not a finite number in 1 row"):
        read_log(frame, min_rating=4)
    log = read_log(frame, min_rating=4, quarantine=tmp_path / "bad.csv")
    assert (log.frame["user_id"].to_list(), log.n_quarantined) == ([1], 2)
    bad = pl.read_csv(tmp_path / "bad.csv")
    assert sorted(bad["reason"]) == ["rating is not a finite number", "rating is null"]
    # A row of rating 3 has no user, and does not count.
    assert read_log(rated().with_columns(user_id=pl.Series([1, None, 3])), min_rating=4).frame["user_id"].to_list() == [
        1,
        3,
    ]


def test_a_lowest_rating_without_rows_or_without_ratings_is_refused() -> None:
    with pytest.raises(NoRowsError, match=r"has no row with a rating of at least 6. The highest is 5\.0"):
        read_log(rated(), min_rating=6)
    with pytest.raises(LogError, match="has no column rating, which --min-rating needs. Pass --columns rating=NAME"):
        read_log(rated().drop("rating"), min_rating=4)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match="is no finite number"):
            read_log(rated(), min_rating=wrong)


FORMATS = {
    "movielens": ("ratings.csv", "userId,movieId,rating,timestamp\n", "{0},{0},{1},{2}\n"),
    "amazon": ("ratings.csv", "", "{0},{0},{1},{2}\n"),
    "recbole": ("log.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n", "{0}\t{0}\t{1}\t{2}\n"),
}


@pytest.mark.parametrize("format", FORMATS)
def test_ratings_of_public_formats_select_rows(tmp_path: Path, format: str) -> None:
    name, header, line = FORMATS[format]
    rows = [line.format(number + 1, rating, NOON + number) for number, rating in enumerate(RATINGS)]
    (tmp_path / name).write_text(header + "".join(rows))
    assert 'Column "rating" is not used.' in read_log(tmp_path / name, format=format).notes[-1]
    assert read_log(tmp_path / name, format=format, min_rating=4).frame["user_id"].to_list() == [1, 3]


def rated_day(day: int, name: str) -> pl.DataFrame:
    """8 users with items 0 to 3, rated 5, and item 9, rated 1."""
    pairs = [(user, item) for user in range(8) for item in (0, 1, 2, 3, 9)]
    rows = [(u, i, NOON + day * 86_400 + n, 1.0 if i == 9 else 5.0) for n, (u, i) in enumerate(pairs)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", name], orient="row")


def test_updates_select_rows_like_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in (0, 1):
        rated_day(day, "weight").write_csv(tmp_path / f"{day}.csv")
    store = ["--store", str(tmp_path / "store")]
    fit = ["fit", str(tmp_path / "0.csv"), *store, "--model", "popularity"]
    assert app.main(fit) == LogError.exit_code
    assert "no model uses weights" in capsys.readouterr().err
    assert app.main([*fit, "--min-rating", "4"]) == 0
    assert app.main(["update", str(tmp_path / "1.csv"), *store, "--force", "--reason", "test"]) == 0
    assert "1.csv: Left out 8 rows with a rating below 4." in capsys.readouterr().out
    events = EventLog(tmp_path / "store" / "log").read()
    assert events["item_id"].unique().sort().to_list() == [0, 1, 2, 3]  # item 9 has the rating 1
    assert len(events) == 2 * 8 * 4 and "weight" not in events.columns
    # An option of the update wins: 2 x 8 further rows of item 9.
    rated_day(2, "weight").write_csv(tmp_path / "2.csv")
    assert app.main(["update", str(tmp_path / "2.csv"), *store, "--min-rating", "0", "--force", "--reason", "x"]) == 0
    assert (EventLog(tmp_path / "store" / "log").read()["item_id"] == 9).sum() == 8


def test_a_store_whose_log_holds_weights_takes_further_files_with_weights(tmp_path: Path) -> None:
    rated_day(0, "x").drop("x").write_csv(tmp_path / "0.csv")
    store = ["--store", str(tmp_path / "store")]
    assert app.main(["fit", str(tmp_path / "0.csv"), *store, "--model", "popularity"]) == 0
    rated_day(1, "weight").write_csv(tmp_path / "1.csv")
    update = ["update", str(tmp_path / "1.csv"), *store, "--force", "--reason", "test"]
    assert app.main(update) == LogError.exit_code  # a store of this version
    earlier = read_log(rated_day(2, "x")).frame.with_columns(weight=1.0)  # as version 0.1.0 read it
    EventLog(tmp_path / "store" / "log").append(earlier, "a batch of 0.1.0", True)
    rated_day(3, "weight").write_csv(tmp_path / "1.csv")
    assert app.main(update) == 0
    assert len(EventLog(tmp_path / "store" / "log").read()) == 3 * 8 * 5


def test_validate_repeats_its_options_in_the_next_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rated_day(0, "rating").write_csv(tmp_path / "log.csv", separator=";")
    options = ["--separator", "semicolon", "--min-rating", "4"]
    assert app.main(["validate", str(tmp_path / "log.csv"), *options]) == 0
    said = capsys.readouterr().out
    assert "Left out 8 rows with a rating below 4." in said
    assert f"freshrec fit {tmp_path / 'log.csv'} --separator semicolon --min-rating 4 --store shop" in said
    assert app.main(["validate", str(tmp_path / "log.csv"), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 8 * 4


def test_recipes_hold_the_separator_and_the_lowest_rating(tmp_path: Path) -> None:
    rated_day(0, "rating").write_csv(tmp_path / "log.csv", separator=";")
    given = {"log": {"path": str(tmp_path / "log.csv"), "separator": ";", "min_rating": "4"}, "spans": {}, "replay": {}}
    recipe = resolve_recipe(None, given)
    assert len(load_log(recipe).frame) == 8 * 4
    for whole in (recipe, Recipe()):
        save_recipe(whole, tmp_path / "recipe.toml")
        assert load_recipe(tmp_path / "recipe.toml") == whole


def test_a_recommender_ignores_the_weights_of_a_frame_with_a_warning(tmp_path: Path) -> None:
    frame = rated_day(0, "weight")
    plain = Recommender("popularity").fit(frame.drop("weight")).recommend([1])
    with pytest.warns(UserWarning, match="Column weight is not used, because no model uses weights. Pass min_rating"):
        recommender = Recommender("popularity").fit(frame)
    assert recommender.recommend([1]).equals(plain)
    with pytest.warns(UserWarning, match="Column weight is not used"):
        recommender.update(rated_day(1, "weight"))
    frame.write_csv(tmp_path / "log.csv")
    with pytest.raises(LogError, match="no model uses weights"):
        Recommender("popularity").fit(tmp_path / "log.csv")


def test_a_recommender_keeps_its_lowest_rating_when_it_is_saved(tmp_path: Path) -> None:
    recommender = Recommender("popularity").fit(rated_day(0, "rating"), min_rating=4)
    assert len(recommender.served.items) == 4  # items 0 to 3; item 9 has the rating 1
    recommender.save(tmp_path / "saved")
    again = Recommender.load(tmp_path / "saved").update(rated_day(1, "rating"))
    assert len(again.served.items) == 4
