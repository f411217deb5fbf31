"""What a replay prints when it ends: a table that fits, sentences that follow from the numbers, a command that works.

The replays are written by hand: of each query a method either finds the target at rank 1 (ndcg 1) or misses it.
"""

import json
import shlex
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from typer.main import get_command

from freshrec.cli.app import app, main
from freshrec.data.split import describe_spans, split_log
from freshrec.data.synthetic import make_world
from freshrec.models import find_model
from freshrec.replay.answer import Answer, headline_metric, read_answer
from freshrec.replay.answer_text import describe_answer, describe_tests, fit_command, render_answer, render_command
from freshrec.replay.cell import Cell
from freshrec.replay.progress import ProgressBoard, print_plan
from freshrec.replay.recipe_schema import LogRecipe
from freshrec.replay.results import collect_results
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


def test_where_nothing_wins_the_cheaper_reference_is_recommended(tmp_path: Path) -> None:
    # 17 hits against 16: one user differs, and flipping one sign of one changes nothing: p = 1.
    answer = answer_of(tmp_path, {FROZEN: (15, 0.0), FINETUNE: (16, 2.0), IMSR: (17, 3.0)})
    text = text_of(answer)
    assert "Its lead is within chance for 2 of the 2 others." in text
    assert "it gains +0.0250 (+6 %), within chance. Nothing is better than comirec-dr with finetune beyond" in text
    assert "comirec-dr with finetune costs less and may be as good: use it." in text
    assert answer.chosen() == ("comirec-dr", "finetune")


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


def test_a_name_without_options_is_shown_where_it_is_clear_and_explained(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, {method("mf:d=8", "finetune:fit.epochs=2"): (5, 0.1), KNN: (4, 0.0)})
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
    assert max(map(len, shown.err.splitlines())) <= 80  # a pipe has 80 columns
    assert "mf frozen, seed 0, base block: trained, " in shown.err
    assert "mf finetune, seed 0, base block: trained earlier, " in shown.err
    assert "item-knn absorb, seed 0, base block: absorbed, " in shown.err and "ndcg@20 - " not in shown.err
    next_command = shown.out.split("Next:\n")[1].replace("\\\n", " ")
    assert main(shlex.split(next_command)[1:]) == 0


def test_the_spans_are_readable_at_80_columns() -> None:
    log = make_world("drift", users=200, items=80, events=4000).log
    file = Console(width=80, force_terminal=False, record=True, quiet=False, stderr=True)
    print_plan(file, 12, describe_spans(split_log(log, by="count", spans=6)), ("a note [with brackets]",))
    lines = file.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    base = next(line for line in lines if line.strip().startswith("0 "))
    assert base.split()[1:4] == ["2025-01-01", "to", base.split()[3]] and base.split()[4] == "2000"
    assert "…" not in "".join(lines) and "note: a note [with brackets]" in lines


def test_a_progress_line_has_the_metric_of_the_recipe_as_a_fraction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, FINETUNE, 10, 0.31)
    board = ProgressBoard([FINETUNE], [1], tmp_path, Console(stderr=True), "ndcg@5")
    board.report_span(FINETUNE, 1)
    # 10 hits at rank 1 of 40 users
    assert capsys.readouterr().err.endswith("] comirec-dr finetune, seed 0, span 1: ndcg@5 0.2500, 0.3 CPU-s\n")


def test_a_replay_is_summed_up_by_its_first_ndcg() -> None:
    assert headline_metric(("hr@20", "ndcg@10", "ndcg@20")) == "ndcg@10"
    assert headline_metric(("recall@20", "mrr@20")) == "recall@20" and headline_metric(("auc", "logloss")) == "auc"
