"""From the ranks of a replay to its tables: the files are written by hand, and the expected values are derived."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import epoch_text  # docs/epoch_text.py
import formatting  # docs/formatting.py
import polars as pl
import pytest
import recipe_tables  # docs/recipe_tables.py
import results as page  # docs/results.py

from freshrec.models import find_model
from freshrec.replay.cell import Cell
from freshrec.replay.recipe_schema import Averaging
from freshrec.replay.results import OVERALL_SPAN, collect_results
from freshrec.replay.slices import SLICES
from freshrec.strategies import find_strategy

ROOT = Path(__file__).resolve().parent.parent
HIT, MISS = 1.0, 99.0  # ranks
HR = ("hr@20",)
Row = tuple[int, int, int, float]  # asked, after, user, rank; a user's query in a span is the event of its number


def cell(strategy: str = "frozen", seed: int = 0) -> Cell:
    return Cell("mf", find_model("mf"), strategy, find_strategy(strategy), seed)


def written(out: Path, cell: Cell, rows: list[Row], readout: str = "recent") -> Cell:
    """Write the folder of a run as a replay leaves it."""
    (out / cell.folder_name).mkdir(exist_ok=True)
    asked, after, user, rank = zip(*rows)
    frame = pl.DataFrame({"asked": asked, "after": after, "user": user, "event": user, "rank": rank})
    kinds = [pl.col("asked", "after").cast(pl.Int32), pl.col("rank").cast(pl.Float32)]
    name = f"span-{len(list((out / cell.folder_name).iterdir()))}.parquet"
    frame.with_columns(*kinds, readout=pl.lit(readout)).write_parquet(out / cell.folder_name / name)
    return cell


def collected(cells: list[Cell], out: Path, spans: int = 3, users: int = 8) -> pl.DataFrame:
    events = [(span, user) for span in range(1, spans + 1) for user in range(1, users + 1)]
    facts = pl.DataFrame(events, schema={"span": pl.Int32, "event": pl.Int64}, orient="row")
    return collect_results(cells, facts.with_columns(pl.lit(True).alias(part) for part in SLICES), HR, out)


def values(results: pl.DataFrame, metric: str) -> dict[int, float]:
    rows = results.filter((pl.col("metric") == metric) & (pl.col("slice") == "all"))
    return {span: round(value, 9) for span, value in rows.select("span", "value").iter_rows()}


def test_a_difference_of_the_tests_is_the_difference_of_two_numbers_of_the_table(tmp_path: Path) -> None:
    # Span 1 has two users: a hits both, b hits none. Span 2 has four others: a hits one, b hits two.
    # a: (1 + 1/4) / 2 = 0.625, b: (0 + 2/4) / 2 = 0.25. Pooled users would give 3/6 - 2/6 = 0.167.
    hits = {"finetune": [1, 1, 1, 0, 0, 0], "frozen": [0, 0, 1, 1, 0, 0]}
    cells = []
    for way, hit in hits.items():
        rows = [
            (1 if user < 3 else 2, 0 if user < 3 else 1, user, HIT if hit[user - 1] else MISS) for user in range(1, 7)
        ]
        cells.append(written(tmp_path, cell(way), rows))
    results = collected(cells, tmp_path)
    overall = results.filter((pl.col("span") == OVERALL_SPAN) & (pl.col("slice") == "all"))
    assert dict(overall.select("strategy", "value").iter_rows()) == {"finetune": 0.625, "frozen": 0.25}
    assert pl.read_parquet(tmp_path / "tests.parquet")["difference"].to_list() == pytest.approx([0.375])


def test_forgetting_compares_with_the_model_just_updated_on_the_asked_span(tmp_path: Path) -> None:
    # Before span 1, user 1 is missed: that is no loss. Just after it users 1 and 2 are hits, after span 2 user 1 only:
    # lost 1/2. After span 3 none: lost 1 on span 1; on span 2 user 3 was a miss just after it and is a hit: lost -1.
    # Spans weigh equally: (1 - 1) / 2 = 0.
    rows = [
        (1, 0, 1, MISS),
        (1, 0, 2, MISS),
        (1, 1, 1, HIT),
        (1, 1, 2, HIT),
        (1, 2, 1, HIT),
        (1, 2, 2, MISS),
        (1, 3, 1, MISS),
        (1, 3, 2, MISS),
        (2, 1, 3, HIT),
        (2, 2, 3, MISS),
        (2, 3, 3, HIT),
    ]
    results = collected([written(tmp_path, cell(), rows)], tmp_path)
    assert values(results, "forgetting hr@20") == {2: 0.5, 3: 0.0, OVERALL_SPAN: 0.0}


def test_the_table_shows_and_names_the_forgetting_of_the_headline_metric(tmp_path: Path) -> None:
    # The headline metric is the first ndcg, not the first metric. Just after span 1 the target has rank 1 (ndcg 1), at
    # the end rank 3: ndcg 1 / log2(4) = 0.5, so 0.5 is lost; hr@20 loses nothing. An update costs 0.012 CPU-s.
    one = written(tmp_path, cell(), [(1, 0, 1, HIT), (1, 1, 1, HIT), (1, 2, 1, 3.0), (1, 3, 1, 3.0)])
    for span in (1, 2, 3):
        (tmp_path / one.folder_name / f"costs-{span}.json").write_text(json.dumps({"update_cpu_s": 0.012}))
    collect_results([one], None, ("hr@20", "ndcg@20"), tmp_path)
    head, _, row, _, *notes = (tmp_path / "table.md").read_text().splitlines()
    shown = dict(zip(head.split(" | "), row.split(" | ")))
    assert shown["forgetting ndcg@20"] == "+0.5000" and "forgetting hr@20" not in shown
    assert row.endswith("| <0.1 |") and any("Forgetting: loss of ndcg@20 on held-out" in note for note in notes)


def test_what_was_never_known_cannot_be_forgotten(tmp_path: Path) -> None:
    # One span after the base: there is a model just updated on it, and none after that one.
    results = collected([written(tmp_path, cell(), [(1, 0, 1, HIT), (1, 1, 1, MISS)])], tmp_path, spans=1)
    assert values(results, "forgetting hr@20") == {}


def test_only_the_recent_readout_is_tested(tmp_path: Path) -> None:
    rows = [(1, 0, 1, HIT), (1, 0, 2, MISS)]
    cells = [written(tmp_path, cell(way), rows) for way in ("finetune", "frozen")]
    written(tmp_path, cells[0], rows, readout="stored")
    results = collected(cells, tmp_path)
    assert set(results["model"]) == {"mf", "mf@stored"}
    tests = pl.read_parquet(tmp_path / "tests.parquet")
    assert tests.select("model_a", "model_b").rows() == [("mf", "mf")]


def test_each_query_is_averaged_over_seeds_before_users_are_drawn(tmp_path: Path) -> None:
    # Seed 0 hits the even users, seed 1 the odd ones: each query is 1/2, so no draw of users changes the mean. Each
    # seed alone has an interval around 1/2 whose ends differ.
    cells = []
    for seed in (0, 1):
        rows = [(1, 0, user, HIT if user % 2 == seed else MISS) for user in range(1, 9)]
        cells.append(written(tmp_path, cell(seed=seed), rows))
    results = collected(cells, tmp_path).filter((pl.col("span") == OVERALL_SPAN) & (pl.col("slice") == "all"))
    assert (results["low"] < 0.5).all() and (results["high"] > 0.5).all() and results["seed"].to_list() == [0, 1]
    methods = pl.read_parquet(tmp_path / "methods.parquet")
    assert methods.select("strategy", "value", "low", "high", "n").rows() == [("frozen", 0.5, 0.5, 0.5, 8)]
    assert "| mf | frozen | 0.5000 (0.5000 .. 0.5000) |" in (tmp_path / "table.md").read_text()


def test_costs_are_averaged_over_the_updates_after_the_base_then_over_seeds(tmp_path: Path) -> None:
    # Seed 0: (2 + 4) / 2 = 3 s, seed 1: 5 s; the base's 100 s do not count. Mean 4.
    cells = [written(tmp_path, cell(seed=seed), [(1, 0, 1, HIT)]) for seed in (0, 1)]
    for one, seconds in zip(cells, ([100, 2, 4], [100, 5])):
        for span, cost in enumerate(seconds):
            (tmp_path / one.folder_name / f"costs-{span}.json").write_text(json.dumps({"update_cpu_s": cost}))
    results = collected(cells, tmp_path)
    assert results.filter((pl.col("span") == OVERALL_SPAN) & (pl.col("metric") == "update_cpu_s"))[
        "value"
    ].to_list() == [
        3,
        5,
    ]
    methods = pl.read_parquet(tmp_path / "methods.parquet")
    assert methods.filter(pl.col("metric") == "update_cpu_s")["value"].to_list() == [4]


def test_a_recipe_with_other_metrics_is_reproduced_span_by_span_and_shown_in_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "benchmarks/reproduce.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[log]\nworld = "drift"\nworld_users = 100\nworld_items = 50\nworld_events = 2000\n[spans]\nspans = 3\n'
        '[replay]\nmodels = ["mf:d=8"]\nstrategies = ["finetune:fit.base_epochs=1:fit.epochs=1"]\n'
        'controls = ["item-knn"]\nfrom_span = 2\nmetrics = ["recall@20", "mrr@20"]\n'
    )
    module.reproduce(recipe)
    made = json.loads((tmp_path / "benchmarks/results/mine.json").read_text())
    by_span = pl.DataFrame(made["by_span"]).filter((pl.col("model") == "item-knn") & (pl.col("metric") == "mrr@20"))
    assert by_span["span"].to_list() == [1, 2, 3]
    mean = by_span.filter(pl.col("span") >= 2)["value"].mean()
    lines = recipe_tables.protocol_table(made)
    assert "means over spans 2 to 3, where a span's users weigh equally" in " ".join(lines)
    assert any(line.startswith("| item-knn | absorb |") and f" {mean:.4f} (" in line for line in lines)
    assert any(line.startswith("| mf | finetune |") for line in lines)


def test_click_metrics_cover_all_exposures_of_a_span_and_the_notes_say_so(tmp_path: Path) -> None:
    # Span 1, user 1: a click at p = 0.8, none at 0.6 and 0.2. User 2: a click at 0.4. Of the 4 pairs, only 0.4 < 0.6 is
    # wrong: auc 0.75. Span 2, user 3: a click at 0.3. User 4: none at 0.7. auc 0. The mean over spans is 0.375. User 1
    # alone would have 1. logloss: -(2 ln 0.8 + 2 ln 0.4) / 4 = 0.569717 and -ln 0.3 = 1.203973, mean 0.886845.
    rows = [(1, 1, 1, 0.8), (1, 1, 0, 0.6), (1, 1, 0, 0.2), (1, 2, 1, 0.4), (2, 3, 1, 0.3), (2, 4, 0, 0.7)]
    spans, users, labels, p = zip(*rows)
    columns = {"asked": spans, "user": users, "event": range(6), "label": labels, "p": p}
    one = cell("finetune")
    (tmp_path / one.folder_name).mkdir()
    frame = pl.DataFrame(columns).with_columns(after=pl.col("asked") - 1, readout=pl.lit("recent"))
    frame.write_parquet(tmp_path / one.folder_name / "span-1.parquet")
    collect_results([one], None, ("auc", "logloss"), tmp_path, "targets")
    values = dict(pl.read_parquet(tmp_path / "methods.parquet").select("metric", "value").iter_rows())
    assert values["auc"] == pytest.approx(0.375) and values["logloss"] == pytest.approx(0.886845, abs=1e-6)
    note = (
        "- Quality: mean over spans, with its 95 % interval. Within a span, auc compares every clicked exposure with "
        "every unclicked one, and logloss is the mean over all exposures. Users with more exposures weigh more. Higher "
        "is better; lower for logloss."
    )
    assert note in (tmp_path / "table.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("averaging", "mean"),
    [("users", "spans and users"), ("targets", "spans and targets"), ("pooled", "all targets of all spans")],
)
def test_the_notes_of_a_table_name_what_weighs_equally(averaging: Averaging, mean: str, tmp_path: Path) -> None:
    collect_results([written(tmp_path, cell(), [(1, 0, 1, HIT)])], None, HR, tmp_path, averaging)
    notes = (tmp_path / "table.md").read_text().splitlines()
    assert f"- Quality: mean over {mean}, with its 95 % interval. Higher is better." in notes


def test_no_caption_says_that_users_weigh_equally_in_click_metrics() -> None:
    captions = {}
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        made = json.loads(file.read_text())
        if isinstance(made, dict) and made.get("resolved", {}).get("log", {}).get("exposures"):
            captions[made["recipe"]] = " ".join(recipe_tables.protocol_table(made)[:5])
    assert "asmg-kuairand" in captions
    for caption in captions.values():
        assert "weigh equally" not in caption and "Users with more exposures weigh more." in caption


def result(rows: list[tuple[str, str, float]]) -> dict[str, object]:
    names = ["model", "strategy", "value"]
    methods = pl.DataFrame(rows, schema=names, orient="row").with_columns(metric=pl.lit("ndcg@20"))
    tests = {
        "model_a": ["item-knn"],
        "strategy_a": ["absorb"],
        "model_b": ["mind"],
        "strategy_b": ["full"],
        "difference": [0.02],
        "low": [0.01],
        "high": [0.04],
        "p_adjusted": [0.01],
    }
    return {"recipe": "mine", "methods": methods.to_dict(as_series=False), "tests": tests}


def test_the_page_says_how_the_model_beside_item_knn_was_chosen_and_what_favours_whom() -> None:
    # mind's full retrain is the best one that reads the recent history. item-knn - mind is 0.02 (0.01 .. 0.04), so
    # mind - item-knn is -0.02 (-0.04 .. -0.01).
    found = [result([("mind", "full", 0.3), ("sasrec", "full", 0.2), ("mind@both", "full", 0.4), ("mf", "imsr", 0.9)])]
    text = " ".join(page._claims(found))
    assert "| recipe | best full minus item-knn |" in text
    assert "| mine † | mind: **-0.0200 (-0.0400 .. -0.0100)** |" in text
    assert "chosen on these numbers" in text
    assert "held-out events one update earlier than trained models" in text
    assert "the difference IMSR - full" in text


@pytest.mark.parametrize("tune", [False, True])
def test_the_page_says_that_full_is_untuned(tune: bool) -> None:
    span = {"events": 10, "targets": 5, "seen_share": 0.5}
    log = {"path": "mine.parquet", "users": 0}
    about = recipe_tables.recipe_facts(
        {"recipe": "mine", "spans": [span, span], "resolved": {"log": log, "replay": {"seeds": 1, "tune": tune}}}
    )
    text = " ".join(about)
    assert ("full, which has no options to choose" in text) == tune
    assert "The epochs of the base block are chosen once" in text and "otherwise untuned" in text


def trained_result(**changes: object) -> dict[str, object]:
    """A recipe in which comirec-dr is fine-tuned for 5 epochs and fully retrained for 9, on average over 4 updates."""
    rows = [("comirec-dr", "finetune", "epochs", 5.0), ("comirec-dr", "full", "epochs", 9.0)]
    rows += [("comirec-dr", "full", "stopped_by_patience", 0.75), ("comirec-dr", "full", "stopped_by_minimum", 0.25)]
    rows += [("comirec-dr", "full", "stopped_by_maximum", 0.0)]
    for model, strategy in (("item-knn", "absorb"), ("comirec-dr", "finetune"), ("comirec-dr", "full")):
        rows += [(model, strategy, metric, 0.5) for metric in ("ndcg@20", "hr@20", "update_cpu_s")]
    methods = pl.DataFrame(rows, schema=["model", "strategy", "metric", "value"], orient="row")
    methods = methods.with_columns(low=pl.col("value"), high=pl.col("value"))
    span = {"events": 10, "targets": 5, "seen_share": 0.5}
    # Three trainings of the base block: two seeds choose their number by patience, and one option sets it. The second
    # row is the base block that two strategies share, so it counts once.
    base = {
        "model": ["comirec-dr"] * 4,
        "strategy": ["finetune", "full", "full", "full:fit.base_epochs=4"],
        "seed": [0, 0, 1, 0],
        "span": [0] * 4,
        "epochs": [12.0, 12.0, 24.0, 4.0],
        "stopped_by_patience": [1.0, 1.0, 1.0, None],
        "stopped_by_minimum": [0.0, 0.0, 0.0, None],
        "stopped_by_maximum": [0.0, 0.0, 0.0, None],
    }
    replay = {"seeds": 2, "tune": False, "from_span": 2, "metrics": ["ndcg@20", "hr@20"], "averaging": "users"}
    return {
        "recipe": "mine",
        "commit": "abc1234",
        "methods": methods.to_dict(as_series=False),
        "epochs_by_span": base,
        "spans": [span] * 3,
        "resolved": {"log": {"path": "mine.parquet", "users": 0}, "replay": replay},
    } | changes


def column_of(lines: list[str], name: str) -> dict[str, str]:
    """Strategy -> cell of a column of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[1]: row[rows[0].index(name)] for row in rows[1:]}


@pytest.mark.parametrize("table", [recipe_tables.recipe_table, recipe_tables.protocol_table])
def test_a_table_of_a_recipe_has_the_epochs_and_what_stopped_them(table: Callable[..., list[str]]) -> None:
    lines = [line for line in table(trained_result()) if line.startswith("|")]
    shown = {"finetune": "5 (fixed)", "full": "9 (patience 75 %, minimum 25 %)", "absorb": ""}
    assert column_of(lines, "epochs") == shown
    assert len({line.count("|") for line in lines}) == 1
    # a file without a commit has no reasons, although an early one may have epochs
    old = trained_result()
    del old["commit"]
    assert column_of(table(old), "epochs") == {"finetune": "5", "full": "9", "absorb": ""}
    bare = pl.DataFrame(old["methods"]).filter(~pl.col("metric").str.contains("epochs|stopped"))
    assert "epochs |" not in " ".join(table(old | {"methods": bare.to_dict(as_series=False)}))


def test_the_page_says_which_commit_made_a_recipe_and_by_which_rules() -> None:
    text = " ".join(recipe_tables.recipe_facts(trained_result()))
    assert "- Made by commit abc1234." in text and "Means and tests start at span 2." in text
    assert "on the latest sixth of their own events" in text and "at least 5 epochs" in text
    assert "- Epochs of the base block: 4 to 24, in 3 trainings of 1 model (patience in 2, fixed in 1)." in text
    old = trained_result(resolved={"log": {"path": "a", "users": 0}, "replay": {"seeds": 1, "tune": False}})
    del old["commit"], old["epochs_by_span"]
    text = " ".join(recipe_tables.recipe_facts(old))
    assert "- Made by commit 42fdc16 or earlier, under the rules of that time" in text
    assert "Means and tests start at span 1." in text and "Epochs of the base block:" not in text


def test_the_epochs_of_a_strategy_are_a_mean_over_models() -> None:
    # (4 + 8) / 2 = 6; the first model always stopped by patience, the second by the minimum
    rows = {("a", "full", "epochs"): 4.0, ("b", "full", "epochs"): 8.0}
    rows |= {(model, "full", f"stopped_by_{reason}"): 0.0 for model in "ab" for reason in ("patience", "minimum")}
    rows |= {("a", "full", "stopped_by_patience"): 1.0, ("b", "full", "stopped_by_minimum"): 1.0}
    means = {key: {"value": value} for key, value in rows.items()}
    cell = epoch_text.mean_epochs_cell({"commit": "abc1234"}, means, ["a", "b"], "full")
    assert cell == "6 (patience 50 %, minimum 50 %)"


def test_a_cell_for_several_methods_marks_those_that_trained_nothing() -> None:
    means = {("a", "full", "epochs"): {"value": 7.0}}
    result = {"commit": "abc1234"}
    assert epoch_text.joint_epochs_cell(result, means, [("blend", "refit"), ("a", "full")]) == "- / 7 (fixed)"
    assert epoch_text.joint_epochs_cell(result, {}, [("blend", "refit"), ("a", "full")]) == ""


def test_the_relative_improvement_is_that_of_the_papers() -> None:
    # T31: SML against its full retraining, recall at 5, 10 and 20
    yelp = recipe_tables.improvement([0.2251, 0.3380, 0.4748], [0.1849, 0.2876, 0.4139])
    adressa = recipe_tables.improvement([0.2815, 0.3794, 0.4498], [0.0495, 0.0915, 0.1631])
    assert yelp == pytest.approx(0.180, abs=5e-4) and adressa == pytest.approx(3.197, abs=5e-4)


def test_means_and_tests_begin_with_the_span_that_is_asked_for(tmp_path: Path) -> None:
    # hits of two users: none in span 1, one in span 2, both in span 3
    hits = {(2, 1), (3, 1), (3, 2)}
    asked = [(span, user) for span in (1, 2, 3) for user in (1, 2)]
    rows = [(span, span - 1, user, HIT if (span, user) in hits else MISS) for span, user in asked]
    one = written(tmp_path, cell(), rows)
    facts = pl.DataFrame({"span": [1, 1, 2, 2, 3, 3], "event": [1, 2] * 3}, schema_overrides={"span": pl.Int32})
    facts = facts.with_columns(pl.lit(True).alias(part) for part in SLICES)
    results = collect_results([one], facts, HR, tmp_path, from_span=2)
    assert values(results, "hr@20") == {1: 0.0, 2: 0.5, 3: 1.0, OVERALL_SPAN: 0.75}
    methods = pl.read_parquet(tmp_path / "methods.parquet").filter(pl.col("metric") == "hr@20")
    assert methods["value"].to_list() == [0.75]


def test_pages_print_fractions_and_say_readouts_and_blocks_in_words() -> None:
    # 0.19944 has four digits after rounding; a difference always has its sign; "@both" and "x4" become words
    assert formatting.fraction(0.19944) == "0.1994"
    assert formatting.difference(0.00343, -0.0001, 0.0069) == "+0.0034 (-0.0001 .. +0.0069)"
    assert formatting.model_name("mind@both") == "mind (recent and stored interests)"
    assert formatting.model_name("mind:k=2") == "mind:k=2"
    assert formatting.strategy_name("absorb x16") == "absorb (16 blocks)"
    assert formatting.strategy_name("sml-5x5") == "sml-5x5"


def test_the_readme_shows_the_best_other_method_and_the_costs_of_an_update() -> None:
    # 0.7 of mind@both reads interests in another way, so the best other method is sasrec's full retrain
    ways = [
        ("blend", "refit", 0.8),
        ("item-knn", "absorb", 0.1),
        ("popularity", "absorb", 0.2),
        ("sasrec", "full", 0.6),
    ]
    ways += [("comirec-dr", "finetune", 0.3), ("comirec-dr", "full", 0.4), ("mind@both", "full", 0.7)]
    quality = pl.DataFrame(ways, schema=["model", "strategy", "value"], orient="row").with_columns(
        metric=pl.lit("ndcg@20")
    )
    costs = quality.filter(pl.col("model") == "comirec-dr").with_columns(
        metric=pl.lit("update_cpu_s"), value=pl.Series([1.5, 20.0])
    )
    methods = pl.concat([quality, costs]).to_dict(as_series=False)
    found = {"recipe": "default-mine", "methods": methods, "resolved": {"log": {"path": "my_log.parquet"}}}
    cells = "0.8000 | 0.6000 (sasrec, full) | 0.1000 | 0.2000 | 0.3000 | 0.4000 | 1.5 / 20.0 |"
    assert page._short([found | {"commit": "1a2b3c4"}])[2:] == [f"| my log | {cells}"]
    # A recipe without a commit was made under the old rules.
    assert page._short([found])[2] == f"| my log † | {cells}" and page._short([found])[-1].startswith(
        "Rows marked with †"
    )
