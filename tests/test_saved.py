"""The part of a version that answers: it says what the whole one says, and brings nothing along that learns."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freshrec.data.worlds import make
from freshrec.errors import StateError
from freshrec.models.checkpoint import load_to_ask, load_tree, save_tree
from freshrec.models.scoring import item_vectors
from freshrec.models.tables import tables_of
from freshrec.serve.contents import read_contents, write_contents
from freshrec.serve.list_request import ListRequest
from freshrec.serve.reading import resolve_request
from freshrec.serve.recommend import best_items
from freshrec.serve.recommender import Recommender
from freshrec.serve.saved import SERVED, read_served
from freshrec.types import TrainedModel

FAST = "finetune:fit.base_epochs=1:fit.epochs=1"
WAYS = [
    ("popularity", None), ("item-knn", None), ("sknn", None), ("user-knn", None), ("blend", None), ("mf:d=8", FAST),
    ("gru4rec:d=8", FAST), ("caser:d=8", FAST), ("sasrec:d=8", FAST),
    ("comirec-dr:d=8", "imsr:fit.base_epochs=1:fit.epochs=1"),
]  # fmt: skip


def files_of(model: str, strategy: str | None, folder: Path) -> dict[str, Path]:
    frame = make("drift", users=60, items=40, events=900).log.frame.select("user_id", "item_id", "time")
    write_contents(Recommender(model, strategy).fit(frame).update(frame[-1:]).contents, folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(("model", "strategy"), WAYS)
def test_what_is_loaded_to_ask_answers_to_the_last_bit_as_what_is_loaded_whole(
    model: str, strategy: str | None, tmp_path: Path
) -> None:
    files = files_of(model, strategy, tmp_path)
    whole, asked = read_contents(files).served, read_served(files, load_to_ask).served
    users_N = torch.arange(len(whole.users) + 1)
    for request in (ListRequest(k=7), ListRequest(k=50, exclude_seen=False)):
        wanted = resolve_request(whole, request)
        assert best_items(whole, users_N, wanted).equals(best_items(asked, users_N, wanted))
    if isinstance(whole.state.model, TrainedModel):
        tables = zip(tables_of(whole.state.model).values(), tables_of(asked.state.model).values())
        assert all(len(large.packed.T) == 3 * len(small.packed.T) for large, small in tables)
    assert asked.state.memory is None


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of("sasrec:d=8", FAST, tmp_path)
    whole = load_to_ask(files[SERVED])
    monkeypatch.setattr("freshrec.models.checkpoint.PIECE", 100)  # three rows of 8 floats, and less than one packed
    again = load_to_ask(files[SERVED])
    assert torch.equal(item_vectors(whole[2].model), item_vectors(again[2].model))
    assert torch.equal(whole[2].recent.items_R, again[2].recent.items_R)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    files = files_of("popularity", None, tmp_path)
    files[SERVED].write_bytes(files[SERVED].read_bytes()[:-50])
    with pytest.raises(StateError, match="holds no readable state"):
        read_served(files, load_to_ask)
    with pytest.raises(StateError, match=r"without served\.safetensors cannot be read"):
        read_served({name: path for name, path in files.items() if name != SERVED}, load_to_ask)


def test_what_learns_is_saved_beside_and_versions_of_one_file_are_still_read(tmp_path: Path) -> None:
    files = files_of("comirec-dr:d=8", "imsr:fit.base_epochs=1:fit.epochs=1", tmp_path)
    contents = read_contents(files)
    assert contents.served.state.costs and contents.strategy == load_tree(files["learning.safetensors"])[0]
    served = contents.served
    tree = (contents.strategy, contents.names, contents.reading, served.state, served.counts, served.pending)
    save_tree(tree, tmp_path / "state.safetensors")
    older = {name: path for name, path in files.items() if name not in (SERVED, "learning.safetensors")}
    again = read_contents(older | {"state.safetensors": tmp_path / "state.safetensors"})
    users_N = torch.arange(20)
    wanted = resolve_request(served, ListRequest())
    assert best_items(again.served, users_N, wanted).equals(best_items(served, users_N, wanted))
    assert (again.strategy, again.names, again.reading) == (contents.strategy, contents.names, contents.reading)


def test_reading_what_answers_imports_nothing_that_learns() -> None:
    code = "import sys, freshrec.serve.saved, freshrec.store.versions; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    wrong = [n for n in loaded if n.startswith(("freshrec.learn", "freshrec.strategies", "freshrec.nightly"))]
    assert "freshrec.serve.saved" in loaded and wrong == []
