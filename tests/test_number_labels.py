"""Every number that is stored with a version has a label for people, with its unit and its direction."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from freshrec.cli.app import main
from freshrec.cli.number_labels import (
    LABELS,
    SECTIONS,
    format_bytes,
    format_quantity,
    is_labelled,
    label_of,
    number_rows,
    ordered_keys,
)
from freshrec.data.synthetic import make_world
from freshrec.strategies.self_tuned import SEARCH_SPACE

SRC = Path(__file__).resolve().parent.parent / "src" / "freshrec"


def constants(nodes: list[ast.expr | None]) -> Iterator[str]:
    yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def cost_keys(source: str) -> Iterator[str]:
    """The keys that a module writes into the costs of an update, which a version's manifest repeats."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="add_time"), args=[key, *_]):
                yield from constants([key])
            case ast.Subscript(value=ast.Attribute(attr="costs"), slice=key):
                yield from constants([key])
            case ast.Call(func=ast.Name(id="CostMeter"), args=[ast.Dict(keys=keys)]):
                yield from constants(keys)
            case ast.BinOp(left=ast.Attribute(attr="costs"), op=ast.BitOr(), right=ast.Dict(keys=keys)):
                yield from constants(keys)
            case ast.AugAssign(target=ast.Attribute(attr="costs"), value=ast.Dict(keys=keys)):
                yield from constants(keys)
            case ast.FunctionDef(name=name) if name.endswith("_costs"):
                for child in ast.walk(node):
                    yield from constants(child.keys) if isinstance(child, ast.Dict) else ()


def test_every_number_that_a_strategy_measures_has_a_label() -> None:
    files = [*(SRC / "strategies").glob("*.py"), *(SRC / "learn").glob("*.py")]
    found = {key for file in files for key in cost_keys(file.read_text())} | SEARCH_SPACE.keys()
    # One of each way of writing: add_time, costs[...], CostMeter({...}), costs | {...}, costs |= {...}, a function.
    examples = {"train_cpu_s", "nid_rate", "rows_read", "transfer_cpu_s", "trained_worth", "mean_k", "replay_share"}
    assert examples <= found
    assert {key for key in found if not is_labelled(key)} == set()


WAYS = {
    "blend": (),
    "item-knn": (),
    "comirec-dr:d=8": ("--strategy", "imsr:fit.base_epochs=1:fit.epochs=1"),
}


@pytest.mark.parametrize("model", WAYS)
def test_every_number_that_the_nightly_job_records_has_a_label(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = make_world("drift", users=120, items=50, events=2400).log.frame
    frame = frame.select("user_id", "item_id", timestamp="time")
    at = ("--store", str(tmp_path / "store"))
    for i, part in enumerate((frame[:1500], frame[1500:1800], frame[1800:2100], frame[2100:])):
        part.write_parquet(tmp_path / f"{i}.parquet")
    files = [str(tmp_path / f"{i}.parquet") for i in range(4)]
    assert main(["fit", files[0], *at, "--model", model, *WAYS[model]]) == 0
    for i, file in enumerate(files[1:]):
        retrain = ("--full-every", "1") if i == 2 else ()
        assert main(["update", file, *at, "--force", "--reason", "a test", *retrain]) == 0
    capsys.readouterr()
    assert main(["history", *at, "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)["versions"]
    found = {key for version in versions for key in version["numbers"]}
    assert {"ndcg@20", "ndcg@20 live", "ndcg@20 popularity", "forgetting", "full_gain", "asked", "wait_s"} <= found
    assert {key for key in found if not is_labelled(key)} == set()


def test_a_number_of_a_store_of_0_1_0_has_the_label_of_its_current_name() -> None:
    assert label_of("manner") == label_of("lr_factor") == LABELS["lr_factor"]


def test_a_number_that_only_a_users_strategy_knows_is_printed_in_words() -> None:
    assert not is_labelled("warm_up_cpu_s")
    [row] = number_rows({"warm_up_cpu_s": 2.0})
    assert row == ("time", "warm up", "2.0 CPU-s", "reported by the strategy")


def test_labels_are_distinct_words_in_known_sections() -> None:
    assert {label.section for label in LABELS.values()} == set(SECTIONS)
    names = [label.label for label in LABELS.values()]
    assert len(set(names)) == len(names) and not [name for name in names if "_" in name]
    # `freshrec diff` prints the label, two values of up to 11 columns, and the explanation in 100 columns.
    assert max(map(len, names)) <= 30 and max(len(label.explanation) for label in LABELS.values()) <= 40


@pytest.mark.parametrize("key", ["forgetting", "low", "high", "ndcg@20", "ndcg@20 live", "older", "full_gain"])
def test_every_quality_says_which_direction_is_better(key: str) -> None:
    text = " ".join(label_of(key))
    assert "higher is better" in text or "positive = " in text or "95 % interval" in text or "same queries" in text


def test_forgetting_has_a_sign_and_says_what_it_means() -> None:
    # The parent had 0.3123 on older events, the version has 0.3000: it lost 0.0123.
    [row] = number_rows({"forgetting": 0.0123})
    assert row.value == "+0.0123" and "positive = lost" in row.explanation


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.19944, "fraction", "0.1994"),
        (0.00344, "change", "+0.0034"),
        (-0.5, "change", "-0.5000"),
        (1234567.0, "count", "1,234,567"),
        (0.689, "loss", "68.9 %"),
        (1.0, "loss", "none"),  # even the loss of everything is not noticed
        (12.34, "s", "12.3 s"),
        (0.0123, "CPU-s", "0.012 CPU-s"),
        (0.123456, "number", "0.1235"),
    ],
)
def test_quantities_are_printed_with_their_unit(value: float, unit: str, expected: str) -> None:
    assert format_quantity(value, unit) == expected


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (18_556_086, "18.6 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes_are_printed_in_powers_of_1000(n_bytes: float, expected: str) -> None:
    assert format_bytes(n_bytes) == expected


def test_keys_are_ordered_by_section_then_as_in_the_table_with_metrics_first() -> None:
    keys = ["wait_s", "own_number", "forgetting", "ndcg@20", "ndcg@20 live", "new_users", "new_events"]
    in_order = ["new_events", "new_users", "ndcg@20", "ndcg@20 live", "forgetting", "wait_s", "own_number"]
    assert ordered_keys(keys) == in_order
