"""The command line: fit, update, recommend and list, what they print, and how they fail."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest
from names import options_of

from freshrec.cli.app import GROUPS, LISTED_KINDS, app, main
from freshrec.cli.output import print_json
from freshrec.cli.replay import resolve_recipe
from freshrec.data.split_config import SplitConfig
from freshrec.data.synthetic import make_world
from freshrec.models import MODELS, find_model
from freshrec.replay.metrics import METRICS
from freshrec.replay.recipe_schema import LogRecipe, Recipe, ReplayRecipe, save_recipe
from freshrec.strategies import ALIASES, STRATEGIES, find_strategy
from freshrec.strategies.refit import TARGETS_PER_SECOND
from freshrec.version import __version__


@pytest.fixture
def logs(tmp_path: Path) -> tuple[str, str]:
    """Paths of a log of 3,000 events with columns of its own, and of the 1,000 events after it."""
    frame = make_world("drift", users=200, items=80, events=4000).log.frame
    frame = frame.select(who="user_id", what="item_id", when="time")
    paths = str(tmp_path / "log.parquet"), str(tmp_path / "new.csv")
    frame[:3000].write_parquet(paths[0])
    frame[3000:].write_csv(paths[1])
    return paths


PROGRESS = re.compile(r"\[\d+ s\] [a-z]")  # a line of the progress of a fit
COLUMNS = ("--columns", "user_id=who,item_id=what,timestamp=when")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command and return its stdout. It must succeed, and print nothing but the progress of a fit on stderr."""
    code = main(arguments)
    out, err = capsys.readouterr()
    has_progress = arguments[0] == "fit" and "--json" not in arguments
    assert (code, [line for line in err.splitlines() if not (has_progress and PROGRESS.match(line))]) == (0, [])
    return out


def test_fit_update_and_recommend_hand_a_recommender_on(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, new, at = *logs, str(tmp_path / "at")
    fitted = answer(capsys, "fit", log, "--store", at, "--model", "item-knn", *COLUMNS)
    assert fitted.startswith(f"Version 1 is live in {at}.\n  Read        3,000 events, ")
    assert f"\nNext: freshrec update NEW-EVENTS --store {at}\n      freshrec recommend --store {at} " in fitted
    users = pl.read_parquet(log)["who"].n_unique()
    [learnt] = json.loads(answer(capsys, "update", new, "--store", at, "--json"))
    everybody = pl.concat([pl.read_parquet(log), pl.read_csv(new)])["who"].n_unique()
    assert (learnt["numbers"]["new_events"], learnt["numbers"]["new_users"]) == (1000, everybody - users)
    assert learnt["recipe"]["model"] == "item-knn" and learnt["recipe"]["strategy"] == "absorb"
    rows = json.loads(answer(capsys, "recommend", "3", "99999", "--store", at, "--k", "2", "--json"))
    assert [(row["user_id"], row["rank"]) for row in rows] == [(3, 1), (3, 2), (99999, 1), (99999, 2)]
    assert [row["fallback"] for row in rows] == [None, None, "unknown user", "unknown user"]


def test_deliveries_before_one_that_cannot_be_read_are_learnt_and_told(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, new, at = *logs, str(tmp_path / "at")
    answer(capsys, "fit", log, "--store", at, "--model", "popularity", *COLUMNS)
    (tmp_path / "bad.csv").write_text("who,what\n1,2\n")
    why = ["--force", "--reason", "a test"]
    assert main(["update", new, str(tmp_path / "bad.csv"), "--store", at, "--json", *why]) == 3
    out, err = capsys.readouterr()
    version, ended = json.loads(out)
    assert version["id"] == 2 and ended["exit_code"] == 3 and "bad.csv" in ended["error"] and ended["error"] in err
    assert json.loads(answer(capsys, "status", "--store", at, "--json"))["live"] == 2


def test_what_is_fitted_without_options_is_the_blend_and_a_budget_sizes_its_training(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = tmp_path / "at", tmp_path / "sized"
    fitted = json.loads(answer(capsys, "fit", logs[0], "--store", str(at[0]), *COLUMNS, "--json"))
    assert (fitted["recipe"]["model"], fitted["recipe"]["strategy"]) == ("blend", "refit")
    fitted = json.loads(answer(capsys, "fit", logs[0], "--store", str(at[1]), "--budget", "2m", *COLUMNS, "--json"))
    assert fitted["recipe"]["strategy"] == f"refit:max_passes={120 * TARGETS_PER_SECOND}"
    answer(capsys, "update", logs[1], "--store", str(at[1]))


def test_a_blend_says_why_it_offers_an_item(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = str(tmp_path / "at")
    answer(capsys, "fit", logs[0], "--store", at, "--model", "blend", *COLUMNS)
    item = json.loads(answer(capsys, "recommend", "3", "--store", at, "--k", "1", "--json"))[0]["item_id"]
    reasons = json.loads(answer(capsys, "explain", "3", str(item), "--store", at, "--json"))
    assert {"markov", "pooled", "own history", "correction"} <= {reason["source"] for reason in reasons}
    assert any(reason["place"] for reason in reasons)  # somebody offers it
    assert answer(capsys, "explain", "3", str(item), "--store", at).startswith(f"Item {item} is ranked 1 of ")
    assert main(["explain", "3", "999999", "--store", at]) == 2
    assert 'There is no item "999999". Check the id.' in capsys.readouterr().err


def test_a_fitted_model_and_its_strategy_take_options(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ("--model", "comirec-dr:d=8:k=2", "--strategy", "imsr:fit.base_epochs=1:fit.epochs=1")
    fitted = json.loads(answer(capsys, "fit", logs[0], "--store", str(tmp_path / "at"), *ways, *COLUMNS, "--json"))
    assert (fitted["recipe"]["model"], fitted["recipe"]["strategy"]) == (ways[1], ways[3])
    assert fitted["recipe"]["model_options"]["k"] == 2 and fitted["sizes"]["events"] == 3000


def test_recommended_items_can_be_allowed_denied_and_seen(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = str(tmp_path / "at")
    answer(capsys, "fit", logs[0], "--store", at, "--model", "popularity", *COLUMNS)
    seen = pl.read_parquet(logs[0]).filter(pl.col("who") == 3)["what"]
    popular = pl.read_parquet(logs[0])["what"].value_counts(sort=True)["what"]
    fresh = [item for item in popular if item not in seen]

    def items(*options: str) -> list[int]:
        return [
            row["item_id"] for row in json.loads(answer(capsys, "recommend", "3", "--store", at, *options, "--json"))
        ]

    assert items("--k", "1")[0] in fresh
    assert items("--k", "1", "--allow", f"{fresh[-1]},{seen[0]}") == [fresh[-1]]
    assert items("--k", "1", "--allow", str(seen[0]), "--no-exclude-seen") == [seen[0]]
    assert set(items("--k", "80", "--deny", f"{fresh[0]},{fresh[1]}")) == set(fresh[2:])


def test_the_flag_of_0_1_0_that_keeps_seen_items_still_works_with_one_line_of_warning(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = str(tmp_path / "at")
    answer(capsys, "fit", logs[0], "--store", at, "--model", "popularity", *COLUMNS)
    new = answer(capsys, "recommend", "3", "--store", at, "--no-exclude-seen", "--json")
    assert new != answer(capsys, "recommend", "3", "--store", at, "--exclude-seen", "--json")
    assert main(["recommend", "3", "--store", at, "--include-seen", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == new
    assert err == "warning: --include-seen is now called --no-exclude-seen. The old name still works.\n"


def test_a_table_for_people_has_a_line_per_item(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = str(tmp_path / "at")
    answer(capsys, "fit", logs[0], "--store", at, "--model", "popularity", *COLUMNS)
    lines = answer(capsys, "recommend", "3", "--store", at, "--k", "4").splitlines()
    assert lines[0].split() == ["user", "rank", "item", "score", "fallback"]
    assert [line.split()[:2] for line in lines[1:-1]] == [["3", str(rank)] for rank in (1, 2, 3, 4)]
    assert lines[-1] == "Scores compare within one list only; higher is better."


@pytest.mark.parametrize("kind", LISTED_KINDS)
def test_every_name_is_listed_on_a_line_with_what_it_is_and_long_lines_continue_indented(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # tests in several processes have 80 there
    names = json.loads(answer(capsys, "list", kind, "--json"))
    assert main(["list", kind]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(names)
    assert max(len(line) for line in lines + printed.err.splitlines()) <= 100  # columns
    # how to name one's own goes to stderr, so that stdout has the names and nothing else
    hint = {"models": " my_model:MyModelSpec:hours=2.", "strategies": " my_strategy:MyStrategy:keep=0.3."}.get(kind, "")
    assert hint in printed.err and bool(hint) == bool(printed.err)
    assert all(len(text) > 10 for text in names.values())


def test_the_checks_of_doctor_are_wrapped_at_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = answer(capsys, "doctor").splitlines()
    assert first.startswith("ok     Python ") and max(len(line) for line in (first, *others)) <= 100
    assert all(line.startswith((" " * 7, "ok     ")) for line in others)


def test_each_metric_is_listed_with_its_range_and_its_direction(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads(answer(capsys, "list", "metrics", "--json"))
    assert all(text.endswith("; 0 to 1, higher is better") for text in metrics.values()) and len(metrics) == 4


def test_the_lists_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(answer(capsys, "list", "models", "--json")).keys() == MODELS.keys()
    assert json.loads(answer(capsys, "list", "strategies", "--json")).keys() == STRATEGIES.keys() | ALIASES.keys()
    assert json.loads(answer(capsys, "list", "metrics", "--json")).keys() == {f"{name}@k" for name in METRICS}


@pytest.mark.parametrize("command", [["--help"], ["list", "models"], ["list", "strategies"], ["fit", "--help"]])
def test_what_only_informs_starts_without_torch(command: list[str]) -> None:
    code = f"import sys; from freshrec.cli.app import main; main({command}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_the_package_runs_as_a_module_and_tells_its_version() -> None:
    found = subprocess.run([sys.executable, "-m", "freshrec", "--version"], check=True, capture_output=True, text=True)
    assert found.stdout == f"freshrec {__version__}\n"


def test_the_help_groups_hold_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"─ {group} ─") == 1 for group in GROUPS)
    grouped = [command for commands in GROUPS.values() for command in commands]
    assert len(grouped) == len(set(grouped)) == len(app.registered_commands)


def test_a_variant_is_listed_with_the_options_that_make_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_of(STRATEGIES["imsr-no-eir"]) == ["retain=none"]
    assert options_of(STRATEGIES["imsr-dir"]) == ["retain.form=distance"]
    assert "[retain.form=distance]" in json.loads(answer(capsys, "list", "strategies", "--json"))["imsr-dir"]


@pytest.mark.parametrize("name", [*MODELS, *STRATEGIES])
def test_the_options_listed_for_a_variant_make_it_from_its_plain_form(name: str) -> None:
    """What is printed in brackets can be typed: popularity:weighting=last is popularity-last."""
    table, find = (MODELS, find_model) if name in MODELS else (STRATEGIES, find_strategy)
    plain = next(n for n, thing in table.items() if thing == type(table[name])())  # type: ignore[attr-defined]
    assert find(":".join([plain, *options_of(table[name])])) == table[name]  # type: ignore[operator]


FAILS = [
    (["fit", "LOG", "--store", "OUT", "--model", "sasrek"], 2, 'There is no model "sasrek". Did you mean "sasrec"?'),
    (["fit", "LOG", "--store", "OUT", "--strategy", "fintune"], 2, 'Did you mean "finetune"?'),
    (["fit", "LOG", "--store", "OUT", "--model", "mf", "--strategy", "imsr"], 5, "several interests"),
    (["fit", "LOG", "--store", "OUT", "--model", "mf:dim=3"], 2, "dim"),
    (
        ["fit", "LOG", "--store", "OUT", "--budget", "10"],
        2,
        '--budget is "10", which has no unit. Write 90s, 10m or 2h.',
    ),
    (["fit", "LOG", "--store", "OUT", "--budget", "0m"], 2, '--budget is "0m", which is not a duration'),
    (
        ["fit", "LOG", "--store", "OUT", "--budget", "10m", "--model", "mf"],
        2,
        "--budget applies only to the default model",
    ),
    (["fit", "LOG", "--store", "OUT"], 3, "has no column user_id"),
    (["fit", "OUT", "--store", "NEW"], 3, "OUT"),
    (["fit", "LOG", "--store", "FULL", *COLUMNS], 2, "is not empty. Choose a new folder"),
    (["update", "LOG", "--store", "OUT"], 7, "There is no store in"),
    (
        ["fit", "LOG", "--store", "s3://bucket/shop", *COLUMNS],
        2,
        "s3://bucket/shop is a URL, but a store must be in a local folder",
    ),
    (["fit", "LOG", "--store", "SHOP", *COLUMNS], 2, "SHOP already holds a store. Use `freshrec update`"),
    (["fit", "LOG", "--store", "OUT", *COLUMNS, "--until", "2017-13-01"], 2, '--until is "2017-13-01", which is not a'),
    (["fit", "LOG", "--store", "OUT", "--model", "xyz"], 2, 'no model "xyz". `freshrec list models` lists the valid'),
    (["recommend", "3", "--store", "OUT", "--k", "0"], 2, "--k is 0. It must be at least 1."),
    (["recommend", "3", "--store", "OUT", "--diversity", "-1"], 2, "--diversity is -1. It must be a finite number"),
    (["similar", "3", "--store", "OUT", "--k", "0"], 2, "--k is 0. It must be at least 1."),
    (["inspect", "555", "6", "--store", "OUT"], 2, '"555" is neither user nor item. Write `freshrec inspect user ID`.'),
    (["replay", "LOG", "--cadence", "x", "--out", "OUT"], 2, '--cadence is "x". Write a whole number.'),
    (["replay", "LOG", "--by", "weeks", "--out", "OUT"], 2, '--by is "weeks". Use one of count,'),
    (
        ["replay", "--recipe", "nofile.toml", "--out", "OUT"],
        2,
        "no file nofile.toml. Check the path, or use a recipe",
    ),
    (["recommend", "3", "--store", "OUT"], 7, "There is no store in"),
    (["replay", "LOG", "--world", "drift", "--out", "OUT"], 2, "both"),
    (["list", "world"], 2, 'Did you mean "worlds"?'),
]


@pytest.mark.parametrize(("arguments", "code", "told"), FAILS)
def test_a_mistake_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, told: str, logs: tuple[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.tex").touch()
    (tmp_path / "SHOP").mkdir()
    (tmp_path / "SHOP" / "store.json").touch()
    assert main([logs[0] if argument == "LOG" else argument for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    code = main([*(logs[0] if argument == "LOG" else argument for argument in arguments), "--json"])
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


def test_ids_are_printed_whole_and_as_they_are_however_narrow_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    pl.DataFrame(
        {"user_id": [44008, 44008, 7], "item_id": ["x" * 90, "y", "y"], "timestamp": [1e9, 1e9 + 1, 1e9 + 2]}
    ).write_parquet(tmp_path / "log.parquet")
    at = ["--store", str(tmp_path / "at")]
    answer(capsys, "fit", str(tmp_path / "log.parquet"), *at, "--model", "popularity")
    assert " 44008 " in answer(capsys, "inspect", "user", "44008", *at)
    assert answer(capsys, "recommend", "7", *at).count("x") == 90
    made = json.loads(answer(capsys, "status", "--json", *at))["made_at"]
    minute = f"{made[:10]}{made[11:16]}UTC"
    assert minute in "".join(answer(capsys, "status", *at).split()) and "…" not in answer(capsys, "history", *at)


def test_numbers_that_json_does_not_know_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": float("inf")})
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": null}\n'


def test_a_delivery_may_have_other_columns_and_what_it_is_can_be_seen_before(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, new, at = *logs, str(tmp_path / "at")
    answer(capsys, "fit", log, "--store", at, "--model", "popularity", *COLUMNS)
    pl.read_csv(new).rename({"who": "customer"}).write_csv(tmp_path / "other.csv")
    other = str(tmp_path / "other.csv")
    assert main(["update", other, "--store", at]) == 3
    assert 'other.csv has no column "who". Its columns are' in capsys.readouterr().err
    seen = json.loads(
        answer(capsys, "update", other, "--store", at, "--dry-run", "--json", "--columns", "user_id=customer")
    )
    assert [(one["file"], one["day"]["n_rows"]) for one in seen] == [("other.csv", 1000)]
    assert "other.csv: 1,000 rows" in answer(
        capsys, "update", other, "--store", at, "--dry-run", "--columns", "user_id=customer"
    )
    assert main(["update", other, "--store", at, "--columns", "user_id=customer", "--force", "--reason", "a test"]) == 0
    assert "1,000 new" in capsys.readouterr().out


def test_the_same_file_after_a_rollback_says_how_to_take_it_again(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, new, at = *logs, ["--store", str(tmp_path / "at")]
    answer(capsys, "fit", log, *at, "--model", "popularity", *COLUMNS)
    assert main(["update", new, *at, "--force", "--reason", "a test"]) == 0
    answer(capsys, "rollback", *at)
    assert "update --retry 2" in answer(capsys, "update", new, *at)
    assert "nothing to erase" in answer(capsys, "erase", "999999", *at)
    assert "Nothing to delete." in answer(capsys, "gc", *at)


REPLAY = ("replay", "--models", "mf:d=4", "--strategies", "finetune:fit.base_epochs=1:fit.epochs=1", "--plan", *COLUMNS)


def events_of_spans(shown: str) -> list[int]:
    """The events of spans 0, 1, ... in the table of a plan."""
    table = shown.partition("Span 0 is the base block")[0]
    table = table.replace(" %", "%").replace(",", "")  # "1,000" and "74.7 %" as one word
    rows = [line.split() for line in table.splitlines() if line.split()[0].isdecimal()]
    return [
        int(row[-7]) for row in rows if not row[1].startswith("run")
    ]  # dates have several words: count from the end


def test_a_replay_is_cut_at_the_dates_that_are_given(logs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    dates = pl.read_parquet(logs[0])["when"][[1000, 2000]].cast(pl.Datetime("us")).dt.strftime("%Y-%m-%dT%H:%M:%S.%6f")
    shown = answer(capsys, *REPLAY, logs[0], "--by", "dates", "--dates", ",".join(dates), "--min-history", "2")
    assert events_of_spans(shown) == [1000, 1000, 1000]


def test_a_plan_is_printed_as_json(logs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--spans", "2", "--controls", "", "--extra-pairs", "item-knn/absorb", "--seeds", "2", "--json")
    plan = json.loads(answer(capsys, *REPLAY, logs[0], *flags))
    assert [(span["span"], span["events"]) for span in plan["spans"]] == [(0, 1500), (1, 750), (2, 750)]
    assert plan["n_runs"] == 3  # two seeds of mf, one of item-knn
    rows = plan["estimate_cpu_s"]
    assert [(row["model"], row["n_seeds"]) for row in rows] == [("mf:d=4", 2), ("item-knn", 1)]
    for end in ("low", "high"):
        assert all(r["total"][end] == r["base"][end] + r["updates"][end] + r["measuring"][end] for r in rows)
        assert plan["total_cpu_s"][end] == pytest.approx(sum(row["total"][end] for row in rows))


def test_the_share_of_the_base_and_the_fewest_events_of_a_user_are_options(
    logs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = answer(capsys, *REPLAY, logs[0], "--alpha", "0.9", "--min-events", "5", "--spans", "1")
    n_kept = len(pl.read_parquet(logs[0]).filter(pl.len().over("who") >= 5))
    assert n_kept < 3000
    assert events_of_spans(shown) == [pytest.approx(0.9 * n_kept, abs=2), pytest.approx(0.1 * n_kept, abs=2)]


def test_a_log_given_replaces_the_world_of_a_recipe_and_a_world_its_log(logs: tuple[str, str], tmp_path: Path) -> None:
    save_recipe(Recipe(log=LogRecipe(world="drift")), tmp_path / "world.toml")
    save_recipe(Recipe(log=LogRecipe(path="a.csv")), tmp_path / "log.toml")
    by_log = resolve_recipe(tmp_path / "world.toml", {"log": {"path": logs[0], "world": None}})
    by_world = resolve_recipe(tmp_path / "log.toml", {"log": {"path": None, "world": "newborn"}})
    assert (by_log.log.path, by_log.log.world) == (logs[0], "")
    assert (by_world.log.path, by_world.log.world) == ("", "newborn")


def test_the_default_metrics_are_those_of_clicks_on_a_log_with_exposures(tmp_path: Path) -> None:
    def metrics_of(file: str = "", **given: dict[str, object]) -> tuple[str, ...]:
        (tmp_path / "recipe.toml").write_text(file)
        return resolve_recipe(tmp_path / "recipe.toml" if file else None, {"log": {}, **given}).replay.metrics

    clicks, exposures = ("auc", "logloss"), {"exposures": True}
    assert metrics_of() == ReplayRecipe.metrics
    assert metrics_of(log=exposures) == clicks
    assert metrics_of(log=exposures, replay={"metrics": None}) == clicks  # a flag that is not given is None
    assert metrics_of("[log]\nexposures = true\n") == clicks
    assert metrics_of("[log]\nexposures = true\n", log={"exposures": False}) == ReplayRecipe.metrics
    assert metrics_of("[spans]\nspans = 2\n", log=exposures) == clicks
    # those that the user names remain
    assert metrics_of(log=exposures, replay={"metrics": ("logloss",)}) == ("logloss",)
    assert metrics_of('[replay]\nmetrics = ["hr@5"]\n', log=exposures) == ("hr@5",)
    assert metrics_of('[log]\nexposures = true\n[replay]\nmetrics = ["hr@20"]\n') == ("hr@20",)


FLAGS_OF_0_1_0 = (
    "--recipe --world --models --strategies --by --spans --alpha --dates --targets --n-targets --heldout --min-events "
    "--min-history --seeds --cadence --metrics --data --columns --format --events --users --tune --no-tune --out "
    "--jobs --device --resume --plan --json"
)


def test_every_field_of_a_recipe_is_a_flag_of_replay_and_no_flag_of_0_1_0_is_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = answer(capsys, "replay", "--help")
    fields = {f"--{name.replace('_', '-')}" for part in asdict(Recipe()).values() for name in part}
    flags = (fields - {"--path", "--folder"}) | set(FLAGS_OF_0_1_0.split())  # these two are LOG and --data
    # 16 + 11 + 13 fields, but for two; --recipe --out --jobs --device --resume --plan --json; --data and --no-tune.
    assert len(flags) == 40 - 2 + 7 + 2 and {"--no-sessions", "--no-last-update"} <= set(shown.split())
    assert flags - set(shown.split()) == set()


def test_flags_of_every_kind_reach_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text("[spans]\nspans = 2\nalpha = 0.3\n[replay]\ntune = true\n")
    seen: list[Recipe] = []
    monkeypatch.setattr("freshrec.cli.replay._show_plan", seen.append)
    flags = ("--world", "drift", "--columns", "user_id=who,item_id=what", "--no-tune", "--sessions", "--spans", "3")
    more = (
        "--cadence",
        "1,4",
        "--forget-users",
        "0.2",
        "--unseen",
        "drop",
        "--controls",
        "",
        "--extra-pairs",
        "mf/full,mf/spmf",
    )
    answer(capsys, "replay", "--recipe", str(tmp_path / "recipe.toml"), "--plan", *flags, *more)
    log = LogRecipe(world="drift", columns={"user_id": "who", "item_id": "what"})
    spans = SplitConfig(spans=3, alpha=0.3, sessions=True, forget_users=0.2)
    pairs = ("mf/full", "mf/spmf")
    assert seen == [Recipe(log, spans, ReplayRecipe(cadence=(1, 4), unseen="drop", controls=(), extra_pairs=pairs))]
    assert main(["replay", "--world", "drift", "--alpha", "1"]) == 2
    assert "--alpha is 1.0. It must be above 0 and below 1." in capsys.readouterr().err


def test_an_interrupted_replay_says_how_to_go_on(
    logs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*cells: object, jobs: int, device: str, on_span_done: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("freshrec.replay.runner.run_cells", interrupt)
    code = main(["replay", logs[0], *COLUMNS, "--out", str(tmp_path / "out")])
    assert code == 130
    assert "To continue, add --resume to the command." in " ".join(capsys.readouterr().err.split())


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, freshrec.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
