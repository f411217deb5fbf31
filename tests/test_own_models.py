"""Custom models: the smallest of each kind, with only the members that CONTRIBUTING.md requires."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.nn.functional as F
from serving import items, server, stored
from torch import Tensor, nn

from freshrec import Recommender
from freshrec.cli.app import main
from freshrec.data.histories import insert_events
from freshrec.data.split import LogSplit, split_log
from freshrec.data.synthetic import make_world
from freshrec.errors import OptionError, StateError, TrainingError
from freshrec.learn.fit import FitConfig
from freshrec.models.absorb import absorb_block
from freshrec.models.popularity import PopularitySpec
from freshrec.models.requirements import build_model
from freshrec.nn.embedding_table import EmbeddingTable, lookup_many
from freshrec.nn.layers import sampled_logits, sampled_softmax_loss
from freshrec.nn.ranking import top_k
from freshrec.nn.scoring import history_length, score_items
from freshrec.replay.cell import Cell, ReplaySettings, replay_cell
from freshrec.store.checkpoint import load_for_serving, load_state, save_state
from freshrec.strategies.baselines import Absorb, FineTune
from freshrec.strategies.ewc import EWC
from freshrec.types import Batch, Events, Forward, Histories, ModelSpec, Span, State, Strategy

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "my_model.py"
NOON = 1_767_268_800  # 2026-01-01, in seconds
FIT = FitConfig(base_epochs=3, epochs=1)


@dataclass(frozen=True)
class CountSpec:
    def build(self, seed: int) -> "Count":
        return Count(self)


class Count:
    def __init__(self, spec: CountSpec) -> None:
        self.spec, self.n_users, self.n_items = spec, 0, 0
        self.counts_I = torch.zeros(1)

    def grow(self, n_users: int, n_items: int) -> None:
        self.counts_I = F.pad(self.counts_I, (0, n_items - self.n_items))
        self.n_users, self.n_items = n_users, n_items

    def absorb(self, events: Events, histories: Histories) -> None:
        self.counts_I = self.counts_I + torch.bincount(events.items_E, minlength=self.n_items + 1)

    def score(self, batch: Batch, items: Tensor) -> Tensor:
        return self.counts_I[items].expand(len(batch), -1)


@dataclass(frozen=True)
class SumSpec:
    d: int = 8
    length: int = 20
    lr: float = 0.02
    batch: int = 32
    negatives: int = 32

    def build(self, seed: int) -> "Sum":
        return Sum(self, seed)


class Sum(nn.Module):
    batch_format = "target"

    def __init__(self, spec: SumSpec, seed: int) -> None:
        super().__init__()
        self.spec, self.seed, self.n_users, self.n_items = spec, seed, 0, 0
        self.moments: dict[str, Tensor] = {}
        self.items = EmbeddingTable(spec.d, 0.1, seed)

    def grow(self, n_users: int, n_items: int) -> None:
        self.n_users, self.n_items = n_users, n_items
        self.items.grow(n_items)

    def forward(self, batch: Batch) -> Forward:
        assert batch.targets_BT is not None and batch.negatives_N is not None
        target_B, negative_N = batch.targets_BT[:, 0], batch.negatives_N
        history_BTD, target_BD, negative_ND = lookup_many(self.items, batch.history_BT, target_B, negative_N)
        user_BD = self.encode(history_BTD, batch)[:, 0]
        return Forward(sampled_softmax_loss(sampled_logits(user_BD, target_BD, negative_ND, target_B, negative_N)))

    def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
        return (items_BTD * (batch.history_BT > 0)[..., None]).sum(1, keepdim=True)


COUNT, SUM = CountSpec(), SumSpec()


@pytest.fixture(scope="module")
def checkerboard() -> LogSplit:
    """Even users take only even items, and odd users only odd items."""
    return split_log(
        make_world("checkerboard", users=60, items=40, events=2500, spans=3).log, by="period", forget_users=0
    )


def ranks(spec: ModelSpec, update: Strategy, cut: LogSplit, out: Path) -> pl.DataFrame:
    """Replay one run and return its ranks."""
    cell = Cell("own", spec, "own", update, 0)
    assert list(replay_cell(cell, cut, ReplaySettings(), out)) == [0, 1, 2, 3]
    return pl.concat(pl.read_parquet(out / cell.folder_name / f"span-{span}.parquet") for span in (1, 2, 3))


def trained_state(spec: ModelSpec, update: Strategy, spans: tuple[Span, ...]) -> State:
    """The state after these spans."""
    state = State(spec.build(0))
    for span in spans:
        state = update.update(absorb_block(state, span.events, span.n_users, span.n_items), span)
    return state


def test_the_smallest_counting_model_has_the_ranks_of_popularity_in_a_replay(
    checkerboard: LogSplit, tmp_path: Path
) -> None:
    own = ranks(COUNT, Absorb(), checkerboard, tmp_path / "own")
    assert len(own) > 100 and own.equals(ranks(PopularitySpec(), Absorb(), checkerboard, tmp_path / "ours"))


def test_the_smallest_trained_model_learns_which_items_a_user_takes(checkerboard: LogSplit, tmp_path: Path) -> None:
    # A user takes 20 of 40 items, so half of a random list has the user's colour.
    state = trained_state(SUM, FineTune(FIT), checkerboard.spans)
    even, odd = (Batch(torch.tensor([1]), torch.tensor([row])) for row in rows_of_colours(checkerboard))
    for batch in (even, odd):
        best_10 = top_k(state.model, batch, 10)[0][0]
        colours = [
            checkerboard.item_catalog.ids(best_10).to_list(),
            checkerboard.item_catalog.ids(batch.history_BT[0]).to_list(),
        ]
        assert sum(int(item) % 2 == int(colours[1][0]) % 2 for item in colours[0]) >= 9
    found = ranks(SUM, FineTune(FIT), checkerboard, tmp_path / "finetune")["rank"]
    assert (found <= 20).mean() > 0.8  # 0.5 by chance


def rows_of_colours(cut: LogSplit) -> Iterator[list[int]]:
    """Rows of five even items, then of five odd ones."""
    ids = cut.item_catalog.ids(torch.arange(1, 21)).to_list()
    for colour in (0, 1):
        yield [row for row, item in enumerate(ids, 1) if int(item) % 2 == colour][:5]


def test_the_smallest_trained_model_works_with_strategies_that_need_encode(
    checkerboard: LogSplit, tmp_path: Path
) -> None:
    assert (ranks(SUM, EWC(fit=FIT), checkerboard, tmp_path)["rank"] <= 20).mean() > 0.8  # as above


@pytest.mark.parametrize(("spec", "update"), [(COUNT, Absorb()), (SUM, FineTune(FIT))], ids=["counting", "trained"])
def test_a_state_with_a_custom_model_is_saved_and_can_be_updated_after_loading(
    spec: ModelSpec, update: Strategy, checkerboard: LogSplit, tmp_path: Path, bits: Any
) -> None:
    *first, last = checkerboard.spans
    state = trained_state(spec, update, tuple(first))
    save_state(state, tmp_path / "state")
    again, batch = load_state(tmp_path / "state"), Batch(torch.tensor([1, 2]), torch.tensor([[0, 3], [4, 7]]))
    all_items = torch.arange(1, state.model.n_items + 1)
    for loaded in (again, load_for_serving(tmp_path / "state")):
        assert torch.equal(score_items(loaded.model, batch, all_items), score_items(state.model, batch, all_items))
    after = [
        update.update(absorb_block(each, last.events, last.n_users, last.n_items), last) for each in (state, again)
    ]
    assert bits(after[0]) == bits(after[1])


@pytest.mark.parametrize(("spec", "update"), [(COUNT, None), (SUM, FineTune(FIT))], ids=["counting", "trained"])
def test_a_recommender_serves_and_updates_a_custom_model(
    spec: ModelSpec, update: Strategy | None, tmp_path: Path
) -> None:
    log = pl.DataFrame({"user_id": list("xyzxyz"), "item_id": list("aaabbc"), "timestamp": range(NOON, NOON + 6)})
    recommender = Recommender(spec, update).fit(log)
    recommender.save(tmp_path / "store")
    for each in (recommender, Recommender.load(tmp_path / "store")):
        found = each.recommend(["x"], k=3, exclude_seen=False)
        assert sorted(found["item_id"]) == ["a", "b", "c"]
        if spec is COUNT:  # a was taken three times, b twice, c once
            assert found["item_id"].to_list() == ["a", "b", "c"] and found["score"].to_list() == [3, 2, 1]
            more = each.update(
                pl.DataFrame({"user_id": list("uvw"), "item_id": list("ccc"), "timestamp": [NOON + 9] * 3})
            )
            assert more.recommend(["x"], k=1, exclude_seen=False)["item_id"].to_list() == ["c"]  # four times


def test_a_model_without_the_option_length_reads_the_last_50_events() -> None:
    # User 1 has 60 events. The recommender gives the model the last 50, oldest first.
    histories: list[Tensor] = []

    class Looking(Count):
        def score(self, batch: Batch, items: Tensor) -> Tensor:
            histories.append(batch.history_BT)
            return super().score(batch, items)

    @dataclass(frozen=True)
    class LookingSpec:
        def build(self, seed: int) -> Looking:
            return Looking(CountSpec())

    assert history_length(LookingSpec().build(0)) == 50 and history_length(SUM.build(0)) == 20
    log = pl.DataFrame({"user_id": [1] * 60, "item_id": range(60), "timestamp": range(NOON, NOON + 60)})
    Recommender(LookingSpec()).fit(log).recommend([1], exclude_seen=False)
    assert histories[-1].shape == (1, 50) and histories[-1][0].tolist() == list(range(11, 61))


def test_an_attribute_that_cannot_be_saved_is_named_in_the_error(tmp_path: Path) -> None:
    model = COUNT.build(0)
    model.seen = {3: 1.0}  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"The dict at state\.model\.weights\.seen has keys that are not strings"):
        save_state(State(model), tmp_path / "state")
    model.seen = object()  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"The object at state\.model\.weights\.seen cannot be saved"):
        save_state(State(model), tmp_path / "state")


def test_numbers_texts_and_dicts_of_a_counting_model_are_saved(tmp_path: Path) -> None:
    model = COUNT.build(0)
    model.window, model.parts = 7, {"a": [torch.ones(2), "text", None]}  # type: ignore[attr-defined]
    save_state(State(model), tmp_path / "state")
    again = load_state(tmp_path / "state").model
    assert again.window == 7 and again.parts["a"][1:] == ["text", None]
    assert torch.equal(again.parts["a"][0], torch.ones(2))


def test_missing_members_of_a_model_are_named_before_anything_is_read() -> None:
    class Mute:
        spec, n_users, n_items = None, 0, 0

        def grow(self, n_users: int, n_items: int) -> None: ...

    class Blind(Sum):
        def __init__(self) -> None:
            super().__init__(SUM, 0)
            del self.items

    class Odd(Sum):
        batch_format = "session"

    @dataclass(frozen=True)
    class Spec:
        kind: Any
        length: int = 5
        lr: float = 0.1
        batch: int = 4
        negatives: int = 4

        def build(self, seed: int) -> Any:
            return self.kind()

    @dataclass(frozen=True)
    class Short:
        def build(self, seed: int) -> Any:
            return Sum(SUM, seed)

    for spec, sentence in (
        (Spec(Mute), r'Missing in model "mine" \(Mute\): absorb, score\. See "Adding a model" in CONTRIBUTING.md'),
        (Spec(Blind), "The table of item vectors is missing in model"),
        (Spec(lambda: Odd(SUM, 0)), 'batch_format of model "mine" .* is "session". Use one of target, window'),
        (Short(), r'Missing in the options of model "mine" \(Short\): length, lr, batch, negatives'),
        (CountSpec, r"is a class. Write CountSpec\(\) with brackets"),
        (type("Plain", (), {"build": None})(), "no dataclass. Write @dataclass"),
    ):
        with pytest.raises(OptionError, match=sentence):
            build_model(spec, "mine")
    with pytest.raises(OptionError, match=r'Missing in model "Spec" \(Mute\): absorb, score'):
        Recommender(Spec(Mute))


def test_scores_of_a_wrong_shape_or_type_are_refused_and_described() -> None:
    class Flat(Count):
        def score(self, batch: Batch, items: Tensor) -> Tensor:
            return self.counts_I[items]

    class Whole(Count):
        def score(self, batch: Batch, items: Tensor) -> Tensor:
            return super().score(batch, items).long()

    batch, items_N = Batch(torch.tensor([1, 2]), torch.tensor([[0, 3], [4, 7]])), torch.arange(1, 6)
    for kind, form in ((Flat, r"\(5,\) and type torch.float32"), (Whole, r"\(2, 5\) and type torch.int64")):
        model = kind(COUNT)
        model.grow(2, 5)
        with pytest.raises(
            TrainingError, match=rf"{kind.__name__}.score .* shape {form}. Return floats of shape \(2, 5\)"
        ):
            score_items(model, batch, items_N)


def test_user_vectors_of_a_wrong_shape_are_refused_and_described() -> None:
    class OneVector(Sum):
        def encode(self, items_BTD: Tensor, batch: Batch) -> Tensor:
            return super().encode(items_BTD, batch)[:, 0]

    model = OneVector(SUM, 0)
    model.grow(2, 7)
    batch = Batch(torch.tensor([1, 2]), torch.tensor([[0, 3], [4, 7]]))
    with pytest.raises(TrainingError, match=r"OneVector.encode .* \(2, 8\) .*. Return floats of shape \(2, K, 8\)"):
        score_items(model, batch, torch.arange(1, 8))


def test_the_class_of_the_options_may_be_given_instead_of_an_instance() -> None:
    log = pl.DataFrame({"user_id": list("xyzxyz"), "item_id": list("aaabbc"), "timestamp": range(NOON, NOON + 6)})
    found = Recommender(CountSpec).fit(log).recommend(["x"], k=3, exclude_seen=False)
    assert found["item_id"].to_list() == ["a", "b", "c"]  # taken three times, twice, once
    no_options: Any = Count  # the class of the model stands for that of its options
    assert Recommender(no_options)._bundle.served.state.model.spec == COUNT


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The documented example in the current folder, not yet imported."""
    shutil.copy(EXAMPLE, tmp_path / "my_model.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_model", None)


def test_the_example_counts_items_taken_within_an_hour(example: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # User 1: items 1, 2 half an hour apart, then 3 two hours later. User 2: 2 and, in the next block, 1 a quarter of an
    # hour later. Pairs: (1, 2) twice; (2, 3) only if two hours are allowed.
    monkeypatch.syspath_prepend(Path.cwd())
    import my_model

    hour = 3_600_000_000
    events = Events.trainable(
        torch.tensor([1, 1, 2, 1]), torch.tensor([1, 2, 2, 3]), torch.tensor([0, 0.5, 1, 2.5]) * hour
    )
    later = Events.trainable(torch.tensor([2]), torch.tensor([1]), torch.tensor([1.25]) * hour)
    for hours, after_2 in ((1.0, [0, 2, 0, 0]), (2.0, [0, 2, 0, 1])):
        model = my_model.MyModelSpec(hours=hours).build(0)
        model.grow(2, 3)
        model.absorb(events, Histories.empty())
        model.absorb(later, insert_events(Histories.empty(), events, 2)[0])
        batch = Batch(torch.tensor([1, 2]), torch.tensor([[3, 2], [0, 0]]))
        assert model.score(batch, torch.arange(4)).tolist() == [after_2, [0, 0, 0, 0]]
        assert model.score(batch, torch.tensor([[1, 3], [1, 3]])).tolist() == [after_2[1::2], [0, 0]]


def test_the_example_replays_and_its_store_opens_if_its_module_is_named(
    example: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    *_, day = stored(tmp_path, "my_model.MyModelSpec:hours=2")
    world = ["--world", "drift", "--users", "50", "--spans", "2"]
    assert main(["replay", *world, "--models", "my_model:MyModelSpec", "--strategies", "absorb", "--out", "out"]) == 0
    assert "| my_model:MyModelSpec | absorb |" in (Path("out") / "table.md").read_text()
    del sys.modules["my_model"]  # as in a new process
    ask = ["recommend", "user-1", "--store", "s", "--json"]
    assert main(ask) == 7
    assert "module my_model, which is not imported. If you trust the code, add --allow-import my_model to the" in (
        capsys.readouterr().err
    )
    monkeypatch.setenv("FRESHREC_IMPORT", "my_model")
    assert main(ask) == 0
    best = json.loads(capsys.readouterr().out)
    day.write_parquet("night.parquet")
    assert main(["update", "night.parquet", "--store", "s", "--force", "--reason", "a test"]) == 0
    assert best
    with server(tmp_path) as (client, _):
        assert len(items(client.get("/recommend/user-1", params={"k": 5}))) == 5
    monkeypatch.setenv("FRESHREC_IMPORT", "no_such_module")
    assert main(ask) == 2
    assert "FRESHREC_IMPORT names no_such_module, which cannot be imported" in capsys.readouterr().err
