"""The number of epochs and what stopped them, in words and in the tables of a replay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_answer import FINETUNE, FROZEN, FULL, IMSR, KNN, METRIC, answer_of, method, write_run

from freshrec.learn.fit import EpochChoice, FitConfig
from freshrec.replay.answer import read_answer
from freshrec.replay.answer_text import render_table
from freshrec.replay.cell import Cell
from freshrec.replay.epochs import EpochSummary, epochs_of_method, explain_reasons, summarize_epochs
from freshrec.replay.progress import ProgressBoard
from freshrec.replay.results import collect_results


def chosen(n: float, patience: float = 0.0, minimum: float = 0.0, maximum: float = 0.0) -> dict[str, float]:
    """Costs, or means of costs, of trainings whose number of epochs was chosen."""
    return {"epochs": n, "stopped_by_patience": patience, "stopped_by_minimum": minimum, "stopped_by_maximum": maximum}


@pytest.mark.parametrize(
    ("costs", "long", "short"),
    [
        (EpochChoice(5, "fixed").costs(), "5 (fixed)", "5 fixed"),
        (EpochChoice(12, "patience").costs(), "12 (patience)", "12 patience"),
        (chosen(12.4, patience=1.0), "12.4 (patience)", "12 patience"),
        (chosen(6.2, patience=0.6, minimum=0.4), "6.2 (patience 60 %, minimum 40 %)", "6 mixed"),
        # 1 of 300 updates is 0.3 %, which is not 0 %, and the other 99.7 % are not 100 %
        (chosen(60.0, 1 / 300, 0.0, 299 / 300), "60 (patience <1 %, maximum >99 %)", "60 mixed"),
    ],
)
def test_costs_become_a_number_with_the_reasons_that_stopped_the_training(
    costs: dict[str, float], long: str, short: str
) -> None:
    summary = summarize_epochs(costs)
    assert summary is not None and (summary.long, summary.short) == (long, short)


def test_a_method_that_trains_nothing_has_no_epochs() -> None:
    assert summarize_epochs({"rows_read": 0.0}) is None


def test_the_rows_of_another_readout_have_the_epochs_of_their_model() -> None:
    rows = {("mind", "full", name): {"value": value} for name, value in chosen(7.0, patience=1.0).items()}
    assert epochs_of_method(rows, "mind@stored", "full") == EpochSummary(7.0, {"patience": 1.0})
    assert epochs_of_method(rows, "mind", "frozen") is None


def test_each_reason_is_explained_once_with_the_limits_of_the_options() -> None:
    fixed, patience = EpochSummary(5, {}), EpochSummary(9, {"patience": 1.0})
    both = EpochSummary(6, {"patience": 0.5, "minimum": 0.5})
    fits = [(fixed, FitConfig()), (patience, FitConfig(patience=3)), (both, FitConfig(patience=8, min_epochs=5))]
    assert explain_reasons(fits, is_mixed_shown=True) == (
        "fixed: an option. patience: the quality of held-out events had not risen for 3 or 8 epochs. "
        "minimum: raised to 5. mixed: several reasons; table.md has their shares."
    )
    assert explain_reasons(fits[:1], is_mixed_shown=True) == "fixed: an option."
    assert "mixed" not in explain_reasons(fits, is_mixed_shown=False)


RUNS = {KNN: (6, 0.0), FROZEN: (10, 0.0), FINETUNE: (16, 2.0), FULL: (20, 8.0), IMSR: (30, 3.0)}
EPOCHS = {
    FINETUNE: EpochChoice(5, "fixed").costs(),
    FULL: EpochChoice(12, "patience").costs(),
    IMSR: EpochChoice(5, "fixed").costs(),
}


def written(out: Path, seed: int = 0, epochs: dict[Cell, dict[str, float]] = EPOCHS) -> list[Cell]:
    """Write the runs with their costs, and return them."""
    cells = []
    for cell, (n_hits, cpu_s) in RUNS.items():
        cells.append(replace(cell, seed=seed))
        write_run(out, cells[-1], n_hits, cpu_s)
        costs = {"update_cpu_s": cpu_s} | epochs.get(cell, {})
        (out / cells[-1].folder_name / "costs-1.json").write_text(json.dumps(costs))
    return cells


def column(table: str, name: str, methods: int) -> list[str]:
    """The cells of a right-aligned column."""
    head, *rows = table.splitlines()[: methods + 1]
    end = head.index(name) + len(name)
    return [row[:end].rpartition("  ")[2].strip() for row in rows]


def test_the_answer_has_a_column_with_the_epochs_of_each_trained_method(tmp_path: Path) -> None:
    cells = written(tmp_path)
    collect_results(cells, None, (METRIC,), tmp_path)
    table = render_table(read_answer(cells, tmp_path, METRIC))
    # the best first: imsr 30 hits, full 20, finetune 16, frozen 10, item-knn 6
    assert column(table, "epochs", 5) == ["5 fixed", "12 patience", "5 fixed", "", ""]
    assert max(map(len, table.splitlines())) <= 100
    legend = " ".join(table.split())
    assert "epochs: mean number per update, and what set it. fixed: an option. patience: the quality of" in legend
    assert "had not risen for 8 epochs. CPU-s:" in legend


def test_a_replay_without_trained_models_has_no_column_for_epochs(tmp_path: Path) -> None:
    assert "epochs" not in render_table(answer_of(tmp_path, {KNN: (6, 0.0), method("popularity", "absorb"): (4, 0.0)}))


def test_a_terminal_too_narrow_for_the_column_gets_the_epochs_below_the_table(tmp_path: Path) -> None:
    cells = written(tmp_path)
    collect_results(cells, None, (METRIC,), tmp_path)
    answer = read_answer(cells, tmp_path, METRIC)
    forgot = replace(answer, summaries=tuple(replace(row, forgetting=0.01) for row in answer.summaries))
    # 10 + 8 for the names, 15 for ndcg@20, 10, 7, 10, 11 and 5 for the others, 2 between two columns: 90 columns
    shown = {width: render_table(forgot, width) for width in (60, 80, 95, 100)}
    assert {width: "epochs" in text.splitlines()[0] for width, text in shown.items()} == {
        60: True, 80: False, 95: True, 100: True,
    }  # fmt: skip
    assert max(map(len, shown[80].splitlines())) <= 80
    # imsr and finetune share their number; a table of less than 72 columns has its natural width
    listed = " ".join(shown[80].split())
    assert (
        "epochs per update: 5 (fixed) comirec-dr with imsr, comirec-dr with finetune; "
        "12 (patience) comirec-dr with full. fixed: an option." in listed
    )


def test_table_md_has_the_shares_of_the_reasons_over_updates_and_seeds(tmp_path: Path) -> None:
    # full: 12 epochs by patience with seed 0, and 5 by the minimum with seed 1: (12 + 5) / 2 = 8.5, half of each
    seed_1 = EPOCHS | {FULL: EpochChoice(5, "minimum").costs()}
    cells = [*written(tmp_path), *written(tmp_path, 1, seed_1)]
    collect_results(cells, None, (METRIC,), tmp_path)
    text = (tmp_path / "table.md").read_text()
    ends = [line.split(" | ")[-1].removesuffix("|").strip() for line in text.splitlines() if line.startswith("| ")]
    assert ends == ["epochs", "5 (fixed)", "8.5 (patience 50 %, minimum 50 %)", "5 (fixed)", "", ""]
    assert "- Epochs: mean number per update, and what set it." in text
    # the column of the terminal has one word for both reasons
    assert "8 mixed" in render_table(read_answer(cells, tmp_path, METRIC))


def test_a_progress_line_has_the_epochs_of_the_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    ProgressBoard([FULL], [1], tmp_path, Console(stderr=True)).report_span(FULL, 1)
    # 20 hits at rank 1 of 40 users
    assert capsys.readouterr().err.endswith(": ndcg@20 0.5000, 8.0 CPU-s, epochs: 12 (patience)\n")
