"""What a replay prints when it ends: a table that fits, sentences that follow from the numbers, a command that works.

The replays are written by hand: of each query a method either finds the target at rank 1 (ndcg 1) or misses it.
"""

import json
import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from typer.main import get_command

from freshrec.cli.app import app, main
from freshrec.data.split import describe_spans, split_log
from freshrec.data.synthetic import make_world
from freshrec.models import find_model
from freshrec.recommender.bundle import new_bundle
from freshrec.replay.answer import Answer, headline_metric, read_answer
from freshrec.replay.answer_text import (
    DEFAULT_MODEL,
    DEFAULT_STRATEGY,
    describe_answer,
    describe_tests,
    fit_command,
    format_seconds,
    render_answer,
    render_command,
    render_table,
)
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.replay.progress import ProgressBoard, print_plan
from freshrec.replay.provenance import write_provenance
from freshrec.replay.recipe_schema import LogRecipe
from freshrec.replay.results import collect_results
from freshrec.replay.runner import run_cells
from freshrec.strategies import find_strategy

HIT, MISS = 1.0, 99.0  # ranks
N_USERS = 40
METRIC = "ndcg@20"


def method(model: str, strategy: str, label: str = "") -> Cell:
    return Cell(model, find_model(model), label or strategy, find_strategy(strategy), 0)


def write_run(out: Path, cell: Cell, n_hits: int, cpu_s: float) -> None:
    """A run with one span after the base, in which users 1 to `n_hits` find their target."""
    folder = out / cell.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [HIT if user <= n_hits else MISS for user in range(1, N_USERS + 1)]
    users = pl.Series(range(1, N_USERS + 1), dtype=pl.Int64)
    frame = pl.DataFrame({"user": users, "event": users, "rank": pl.Series(ranks, dtype=pl.Float32)})
    names = (pl.lit(1, pl.Int32).alias("asked"), pl.lit(0, pl.Int32).alias("after"), pl.lit("recent").alias("readout"))
    frame.with_columns(*names).write_parquet(folder / "span-1.parquet")
    (folder / "costs-1.json").write_text(json.dumps({"update_cpu_s": cpu_s}))


def answer_of(out: Path, runs: dict[Cell, tuple[int, float]]) -> Answer:
    for cell, (n_hits, cpu_s) in runs.items():
        write_run(out, cell, n_hits, cpu_s)
    collect_results(list(runs), None, (METRIC,), out)
    return read_answer(list(runs), out, METRIC)


def text_of(answer: Answer) -> str:
    return " ".join(describe_answer(answer)).replace("\N{NO-BREAK SPACE}", " ")


KNN, FROZEN, FINETUNE, FULL, IMSR = (
    method("item-knn", "absorb"),
    *(method("comirec-dr", name) for name in ("frozen", "finetune", "full", "imsr")),
)


def test_where_a_strategy_wins_the_sentences_say_what_it_gains_and_costs(tmp_path: Path) -> None:
    # 30, 16, 16, 10 and 6 hits of 40 users: IMSR leads fine-tuning by 14 / 40 = 0.35, which is 87.5 %. All 14 users
    # differ in the same direction: p = 2 / 2^14 before the correction.
    runs = {KNN: (6, 0.0), FROZEN: (10, 0.0), FINETUNE: (16, 2.0), FULL: (16, 8.0), IMSR: (30, 3.0)}
    answer = answer_of(tmp_path, runs)
    text = text_of(answer)
    assert "Best on this log: comirec-dr with imsr, ndcg@20 0.7500. It is better than all others beyond chance." in text
    assert "Compared with comirec-dr with finetune it gains +0.3500 (+88 %), beyond chance." in text
    assert "comirec-dr with imsr 3.0 CPU-s, comirec-dr with finetune 2.0 CPU-s, comirec-dr with full 8.0 CPU-s" in text
    assert answer.chosen() == ("comirec-dr", "imsr")
    (tests,) = describe_tests(answer)
    assert tests.startswith("Against comirec-dr with finetune. Better beyond chance: imsr (+0.3500, p")
    assert "Within chance: full (+0.0000, p = 1.000)" in tests.replace("\N{NO-BREAK SPACE}", " ")


def test_where_a_lead_over_the_reference_is_within_chance_the_cheaper_reference_is_recommended(tmp_path: Path) -> None:
    # 17 hits against 16: one user differs, and flipping one sign of one changes nothing: p = 1. 17 against 2 is 15
    # users in the same direction: p = 2 / 2^15 before the correction.
    answer = answer_of(tmp_path, {FROZEN: (2, 0.0), FINETUNE: (16, 2.0), IMSR: (17, 3.0)})
    text = text_of(answer)
    assert "Its lead over 1 of the 2 others is within chance." in text
    assert "it gains +0.0250 (+6 %), within chance. Nothing is better than comirec-dr with finetune beyond" in text
    assert "comirec-dr with finetune costs less and may be as good: use it." in text
    assert answer.chosen() == ("comirec-dr", "finetune") and not answer.has_no_winner
    assert "Next:\n  freshrec fit a.csv --model comirec-dr --strategy finetune" in render_answer(
        answer, LogRecipe(path="a.csv")
    )


BLEND = method("blend", "refit")


@pytest.mark.parametrize(
    ("runs", "lead"),
    [
        ({FROZEN: (15, 0.0), FINETUNE: (16, 2.0), IMSR: (17, 3.0)}, "Its lead over both others is within chance"),
        ({FINETUNE: (16, 2.0), IMSR: (17, 3.0)}, "Its lead over comirec-dr with finetune is within chance"),
        ({FROZEN: (15, 0.0), FINETUNE: (16, 2.0), IMSR: (17, 3.0), BLEND: (16, 1.0)}, "Its lead over all 3 others is"),
    ],
)
def test_where_nothing_wins_the_default_model_is_next_and_its_comparison_is_suggested_if_it_is_missing(
    runs: dict[Cell, tuple[int, float]], lead: str, tmp_path: Path
) -> None:
    # 15, 16 and 17 hits: at most two users differ, and the p-value of two equal signs is 2 / 2^2 = 0.5.
    answer = answer_of(tmp_path, runs)
    text = text_of(answer)
    assert lead in text and "so there is no winner." in text and "use it" not in text
    shown = render_answer(answer, LogRecipe(path="a.csv", format="amazon"))
    command, *advice = shown.partition("Next, with the default model:\n")[2].splitlines()
    assert command == "  freshrec fit a.csv --store shop --format amazon"
    assert (
        " ".join(advice) == ""
        if BLEND in runs
        else (
            "The default model, blend, was not compared. To add it to this replay, repeat the command with "
            "--resume --extra-pairs blend/refit."
        )
    )


def test_the_default_model_of_the_advice_is_that_of_fit() -> None:
    options = {option.name: option.default for option in get_command(app).commands["fit"].params}
    assert options["model"] == DEFAULT_MODEL and options["strategy"] is None
    assert new_bundle(DEFAULT_MODEL, None, seed=0).names == (DEFAULT_MODEL, DEFAULT_STRATEGY)


def test_small_costs_are_not_shown_as_zero_and_forgetting_names_its_metric(tmp_path: Path) -> None:
    assert [format_seconds(s) for s in (0.0, 0.012, 0.049, 0.06, 2.04, 123.4, 1234.0)] == [
        "0", "<0.1", "<0.1", "0.1", "2.0", "123", "1,234",
    ]  # fmt: skip
    answer = answer_of(tmp_path, {KNN: (30, 0.012), FINETUNE: (10, 2.0)})
    assert "Cost of an update: item-knn <0.1 CPU-s, comirec-dr with finetune 2.0 CPU-s." in text_of(answer)
    assert render_table(answer).splitlines()[1].endswith("  <0.1")
    forgot = replace(answer, summaries=tuple(replace(row, forgetting=0.01) for row in answer.summaries))
    assert "forgetting: loss of ndcg@20 on held-out events of earlier spans" in " ".join(render_table(forgot).split())


def test_a_control_that_is_best_is_named_as_a_control_beside_the_best_trained_model(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, {KNN: (30, 0.0), FINETUNE: (10, 2.0), IMSR: (16, 3.0)})
    text = text_of(answer)
    assert "Best on this log: item-knn (a control), ndcg@20 0.7500." in text
    # 16 / 40 - 30 / 40
    assert "The best trained model is comirec-dr with imsr, ndcg@20 0.4000 (-0.3500, beyond chance)." in text
    assert fit_command(LogRecipe(path="a.csv"), answer.chosen())[3:7] == ["--model", "item-knn", "--strategy", "absorb"]


def test_a_model_that_is_best_without_updates_is_called_that(tmp_path: Path) -> None:
    text = text_of(answer_of(tmp_path, {FROZEN: (30, 0.0), FINETUNE: (10, 2.0)}))
    assert "That model is not updated at all: no update of comirec-dr was better on this log." in text


def test_no_update_is_called_worse_where_none_was_run(tmp_path: Path) -> None:
    # sasrec was updated, but mf was not
    runs = {method("mf", "frozen"): (30, 0.0), method("sasrec", "finetune"): (10, 2.0)}
    text = text_of(answer_of(tmp_path, runs))
    assert "That model is not updated at all. No update of mf was run." in text and "was better" not in text


def test_a_counting_model_of_the_user_is_not_called_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs" / "examples")
    own = method("my_model:MyModelSpec", "absorb")
    text = text_of(answer_of(tmp_path / "a", {KNN: (30, 0.0), own: (20, 0.0), FINETUNE: (10, 2.0)}))
    # 10 / 40 - 30 / 40
    assert "The best trained model is comirec-dr with finetune, ndcg@20 0.2500 (-0.5000, beyond chance)." in text
    text = text_of(answer_of(tmp_path / "b", {own: (30, 0.0), FINETUNE: (10, 2.0)}))
    assert "is a counting model. The best trained model is comirec-dr with finetune" in text
    assert "trained" not in text_of(answer_of(tmp_path / "c", {KNN: (30, 0.0), own: (20, 0.0)}))


def test_one_comparison_is_not_plural(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, {FROZEN: (10, 0.0), FINETUNE: (30, 2.0)})
    assert "p: paired test over users, corrected for 1 comparison." in render_table(answer)


def test_fine_tuning_that_is_best_is_compared_with_no_update(tmp_path: Path) -> None:
    text = text_of(answer_of(tmp_path, {FROZEN: (10, 0.0), FINETUNE: (30, 2.0), FULL: (29, 9.0)}))
    assert "No other run is better than comirec-dr with finetune." in text
    assert "Compared with no update at all it gains +0.5000, beyond chance." in text


def test_what_is_compared_with_what(tmp_path: Path) -> None:
    # sasrec was not fine-tuned, so its reference is frozen; the best of the two references is that of the control
    sasrec = [method("sasrec", name) for name in ("frozen", "full")]
    answer = answer_of(
        tmp_path, {KNN: (1, 0.0), FINETUNE: (9, 1.0), IMSR: (8, 1.0), sasrec[0]: (5, 0.0), sasrec[1]: (7, 1.0)}
    )
    assert answer.references == {
        ("item-knn", "absorb"): ("comirec-dr", "finetune"),
        ("comirec-dr", "finetune"): ("comirec-dr", "finetune"),
        ("comirec-dr", "imsr"): ("comirec-dr", "finetune"),
        ("sasrec", "frozen"): ("sasrec", "frozen"),
        ("sasrec", "full"): ("sasrec", "frozen"),
    }


LONG = [
    method("comirec-dr:d=16:negatives=64", "finetune:fit.base_epochs=1:fit.epochs=1:fit.lr_scale=0.25"),
    method("comirec-dr:d=16:negatives=64", "imsr:fit.base_epochs=1:fit.epochs=1:retain.weight=0.25"),
    method("comirec-dr:d=16:negatives=64", "imsr:fit.base_epochs=1:fit.epochs=1:retain.weight=0.5:detect.c1=0.2"),
    method("comirec-dr:d=16:negatives=128", "full:fit.base_epochs=1"),
    method("item-knn", "absorb", "absorb x3"),
    method("item-knn", "absorb"),
]


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal(width: int, tmp_path: Path) -> None:
    answer = answer_of(tmp_path, {cell: (5 * i, 1000.0 * i) for i, cell in enumerate(LONG)})
    log = LogRecipe(path="events.parquet", columns={"user_id": "customer", "item_id": "article"}, format="")
    text = render_answer(answer, log, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{NO-BREAK SPACE}" not in text and " x3" not in text and "3 blocks per span" in text
    assert "Next:\n  freshrec fit events.parquet" in text


def test_a_narrow_terminal_gets_all_columns_of_a_table(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, {cell: (5 * i, 1000.0 * i) for i, cell in enumerate(LONG)})
    narrow, wide = (render_table(answer, width).split("\n\n")[0] for width in (40, 1000))
    assert narrow == wide and narrow.split("\n")[0].split() == [
        "model", "strategy", "ndcg@20", "difference", "p", "CPU-s",
    ]  # fmt: skip
    log = make_world("drift", users=200, items=80, events=4000).log
    spans = describe_spans(split_log(log, by="count", spans=6))
    shown = {}
    for width, is_terminal in ((40, True), (40, False), (200, False)):
        console = Console(width=width, force_terminal=is_terminal, color_system=None, record=True, stderr=True)
        print_plan(console, 12, spans, ())
        shown[width, is_terminal] = console.export_text().partition("\nSpan 0")[0]
    assert len(set(shown.values())) == 1


def test_a_name_without_options_is_shown_where_it_is_clear_and_explained(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, {method("mf:d=8", "finetune:fit.epochs=2"): (30, 0.1), KNN: (4, 0.0)})
    text = render_answer(answer, LogRecipe(world="drift"))
    assert text.splitlines()[1].split()[:2] == ["mf", "finetune"]
    assert "Options: mf = mf:d=8, finetune = finetune:fit.epochs=2." in text
    assert "--model mf:d=8 --strategy finetune:fit.epochs=2" in text and "Next (LOG is your own log)" in text


def test_the_next_command_parses_with_every_option_of_the_log_that_fit_takes() -> None:
    log = LogRecipe(
        path="my logs/a.csv", folder="data", columns={"user_id": "uid"}, format="amazon", events=("pv", "buy"),
        until="2025-06-01",
    )  # fmt: skip
    shown = render_command(fit_command(log, ("item-knn", "absorb x3")), width=60)
    assert max(map(len, shown.splitlines())) <= 60 and "\\\n" in shown
    words = shlex.split(shown.replace("\\\n", " "))
    assert words[:2] == ["freshrec", "fit"]
    context = get_command(app).commands["fit"].make_context("fit", words[2:], resilient_parsing=False)
    assert context.params["log"] == Path("data/my logs/a.csv") and context.params["store"] == Path("shop")
    assert (context.params["model"], context.params["strategy"]) == ("item-knn", "absorb")
    assert (context.params["columns"], context.params["events"]) == ("user_id=uid", "pv,buy")


def test_a_replay_prints_its_answer_and_the_next_command_makes_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_world("drift", users=100, items=40, events=2000).log.frame.rename({"user_id": "who"}).write_parquet(
        "a.parquet"
    )
    quick = "fit.base_epochs=1:fit.epochs=1"
    command = (
        "replay a.parquet --columns user_id=who,timestamp=time --spans 2 --models mf:d=4 --controls item-knn --out out"
    )
    assert main([*command.split(), "--strategies", f"frozen:{quick},finetune:{quick}"]) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 100
    assert max(map(len, shown.err.splitlines())) <= 100
    assert shown.err.startswith("3 runs over a base block and 2 spans\n")
    assert "[9/9 spans, " in shown.err  # 3 runs, each with a base block and 2 spans
    assert "mf frozen, seed 0, base block: trained, " in shown.err
    # its cost is that of the run before, so it is not printed again
    assert "mf finetune, seed 0, base block: already trained by an earlier run\n" in shown.err
    assert "item-knn absorb, seed 0, base block: absorbed, " in shown.err and "ndcg@20 - " not in shown.err
    assert "Results in out:\n  table.md, results.parquet, methods.parquet, tests.parquet, recipe.toml\n" in shown.err
    files = shown.err.partition("Results in out:\n")[2].strip().split(", ")
    assert all((tmp_path / "out" / file).exists() for file in files)
    next_command = shown.out.split("Next:\n")[1].replace("\\\n", " ")
    assert main(shlex.split(next_command)[1:]) == 0


def test_the_spans_are_readable_at_80_columns() -> None:
    log = make_world("drift", users=200, items=80, events=4000).log
    file = Console(width=80, force_terminal=False, record=True, quiet=False, stderr=True)
    print_plan(file, 12, describe_spans(split_log(log, by="count", spans=6)), ("a note [with brackets]",))
    lines = file.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    base = next(line for line in lines if line.strip().startswith("0 "))
    assert base.split()[1:4] == ["2025-01-01", "to", base.split()[3]] and base.split()[4] == "2,000"
    assert "…" not in "".join(lines) and "note: a note [with brackets]" in lines
    assert all(line == line.rstrip() for line in lines)
    assert lines[0] == "12 runs over a base block and 6 spans"
    assert lines[1].split() == ["new", "new"] and lines[2].split()[5:] == ["users", "items", "targets", "seen"]


def test_spans_that_share_a_day_are_explained_and_seen_is_a_percentage() -> None:
    spans = pl.DataFrame(
        {
            "span": [0, 1],
            "name": ["", ""],
            **{name: [16_113, 7] for name in ("events", "users", "items", "new_users", "new_items", "targets")},
            "seen_share": [None, 0.22],
        }
    )
    note = "Days are in UTC. Spans that share a day do not overlap"
    for names, has_note in (
        (["2017-11-25 to 2017-11-29", "2017-11-29 to 2017-11-30"], True),
        (["2017-11-29 00:00 to 23:54", "2017-11-29 to 2017-11-30"], True),
        (["2017-11-25 to 2017-11-28", "2017-11-29 to 2017-11-30"], False),
        (["period 0", "period 1"], False),
    ):
        shown = spans.with_columns(name=pl.Series(names))
        console = Console(width=80, force_terminal=False, record=True, stderr=True)
        print_plan(console, 1, shown, ())
        text = console.export_text()
        assert (note in text) == has_note and "16,113" in text and "22.0 %" in text
        assert text.startswith("1 run over a base block and 1 span\n")


def test_a_progress_line_has_the_metric_of_the_recipe_as_a_fraction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, FINETUNE, 10, 0.31)
    board = ProgressBoard([FINETUNE], [1], tmp_path, Console(stderr=True), "ndcg@5")
    board.report_span(FINETUNE, 1)
    # 10 hits at rank 1 of 40 users
    assert capsys.readouterr().err.endswith(" s] comirec-dr finetune, seed 0, span 1: ndcg@5 0.2500, 0.3 CPU-s\n")


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_counter_of_a_resumed_replay_includes_the_spans_that_are_finished(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = split_log(make_world("drift", users=100, items=40, events=1000).log, by="count", spans=2)
    cells, spans = [method(name, "absorb") for name in ("popularity", "item-knn")], [1, 2]
    list(islice(replay_cell(cells[0], split, ReplaySettings(), tmp_path), 2))  # stops after spans 0 and 1
    # claims the folder, as the first replay did
    run_cells(cells[:0], split, ReplaySettings(), tmp_path, on_span_done=lambda cell, span: None)
    write_provenance(tmp_path / cells[0].folder_name, cells[0])
    board = ProgressBoard(cells, spans, tmp_path, Console(stderr=True))
    run_cells(cells, split, ReplaySettings(), tmp_path, jobs=jobs, on_span_done=board.report_span)
    counts = [line.partition(" ")[0] for line in capsys.readouterr().err.splitlines() if " spans, " in line]
    # two runs, each with a base block and 2 spans; 2 of the 6 were finished before
    assert counts == ["[3/6", "[4/6", "[5/6", "[6/6"]


def test_a_replay_is_summed_up_by_its_first_ndcg() -> None:
    assert headline_metric(("hr@20", "ndcg@10", "ndcg@20")) == "ndcg@10"
    assert headline_metric(("recall@20", "mrr@20")) == "recall@20" and headline_metric(("auc", "logloss")) == "auc"
