"""The serving bundle gives the same answers as the whole version, and loads nothing that only training needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freshrec.data.synthetic import make_world
from freshrec.errors import StateError
from freshrec.nn.embedding_table import embedding_tables
from freshrec.nn.scoring import item_vectors
from freshrec.recommender.bundle import read_bundle, write_bundle
from freshrec.recommender.ids import resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.recommender.recommender import Recommender
from freshrec.recommender.serving_bundle import SERVED_FILE, read_serving_bundle
from freshrec.store.checkpoint import load_for_serving, load_tree, save_tree
from freshrec.types import TrainedModel

FAST = "finetune:fit.base_epochs=1:fit.epochs=1"
WAYS = [
    ("popularity", None), ("item-knn", None), ("sknn", None), ("user-knn", None), ("blend", None), ("mf:d=8", FAST),
    ("gru4rec:d=8", FAST), ("caser:d=8", FAST), ("sasrec:d=8", FAST),
    ("comirec-dr:d=8", "imsr:fit.base_epochs=1:fit.epochs=1"),
]  # fmt: skip


def files_of(model: str, strategy: str | None, folder: Path) -> dict[str, Path]:
    frame = make_world("drift", users=60, items=40, events=900).log.frame.select("user_id", "item_id", "time")
    write_bundle(Recommender(model, strategy).fit(frame).update(frame[-1:]).bundle, folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(("model", "strategy"), WAYS)
def test_a_serving_bundle_gives_the_same_lists_as_the_whole_bundle_to_the_last_bit(
    model: str, strategy: str | None, tmp_path: Path
) -> None:
    files = files_of(model, strategy, tmp_path)
    whole, serving = read_bundle(files).served, read_serving_bundle(files, load_for_serving).served
    users_N = torch.arange(len(whole.users) + 1)
    for request in (ListRequest(k=7), ListRequest(k=50, exclude_seen=False)):
        wanted = resolve_request(whole, request)
        assert top_items(whole, users_N, wanted).equals(top_items(serving, users_N, wanted))
    if isinstance(whole.state.model, TrainedModel):
        tables = zip(embedding_tables(whole.state.model).values(), embedding_tables(serving.state.model).values())
        assert all(len(large.packed.T) == 3 * len(small.packed.T) for large, small in tables)
    assert serving.state.memory is None


def test_large_tensors_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of("sasrec:d=8", FAST, tmp_path)
    whole = load_for_serving(files[SERVED_FILE])
    monkeypatch.setattr(
        "freshrec.store.checkpoint.CHUNK_BYTES", 100
    )  # three rows of 8 floats, and less than one packed
    again = load_for_serving(files[SERVED_FILE])
    assert torch.equal(item_vectors(whole[2].model), item_vectors(again[2].model))
    assert torch.equal(whole[2].histories.items_R, again[2].histories.items_R)


def test_a_damaged_or_missing_file_is_an_error(tmp_path: Path) -> None:
    files = files_of("popularity", None, tmp_path)
    files[SERVED_FILE].write_bytes(files[SERVED_FILE].read_bytes()[:-50])
    with pytest.raises(StateError, match="cannot be read"):
        read_serving_bundle(files, load_for_serving)
    with pytest.raises(StateError, match=r"A version without served\.safetensors cannot be read"):
        read_serving_bundle({name: path for name, path in files.items() if name != SERVED_FILE}, load_for_serving)


def test_training_data_has_its_own_file_and_older_versions_with_one_file_are_read(tmp_path: Path) -> None:
    files = files_of("comirec-dr:d=8", "imsr:fit.base_epochs=1:fit.epochs=1", tmp_path)
    contents = read_bundle(files)
    assert contents.served.state.costs and contents.strategy == load_tree(files["learning.safetensors"])[0]
    served = contents.served
    tree = (contents.strategy, contents.names, contents.read_options, served.state, served.counts, served.pending)
    save_tree(tree, tmp_path / "state.safetensors")
    older = {name: path for name, path in files.items() if name not in (SERVED_FILE, "learning.safetensors")}
    again = read_bundle(older | {"state.safetensors": tmp_path / "state.safetensors"})
    users_N = torch.arange(20)
    wanted = resolve_request(served, ListRequest())
    assert top_items(again.served, users_N, wanted).equals(top_items(served, users_N, wanted))
    assert (again.strategy, again.names, again.read_options) == (
        contents.strategy,
        contents.names,
        contents.read_options,
    )


def test_reading_a_serving_bundle_imports_no_training_code() -> None:
    code = "import sys, freshrec.recommender.serving_bundle, freshrec.store.versions; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    wrong = [n for n in loaded if n.startswith(("freshrec.learn", "freshrec.strategies", "freshrec.nightly"))]
    assert "freshrec.recommender.serving_bundle" in loaded and wrong == []
