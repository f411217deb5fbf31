"""Exports agree with the version: vectors and ids give its lists, the index finds the items, ONNX gives the vectors."""

import json
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import pytest
import torch
from serving import run, stored

from freshrec import Recommender
from freshrec.errors import IncompatibleError, OptionError
from freshrec.nn.scoring import user_vectors
from freshrec.recommender.ids import resolve_request
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.lists import top_items
from freshrec.server.export import export_version
from freshrec.server.handlers import LoadedVersion
from freshrec.server.live_version import load_version
from freshrec.store.versions import open_store
from freshrec.types import Batch

IMSR = "imsr:fit.base_epochs=2:fit.epochs=1"
FAST = "finetune:fit.base_epochs=1:fit.epochs=1"


def version_of(folder: Path, model: str, strategy: str | None = None, n: int = 2) -> LoadedVersion:
    stored(folder, model, strategy, n)
    store = open_store(folder / "s")
    return load_version(store, store.manifest(n))


@pytest.mark.parametrize("n", [1, 2])  # histories of version 1 hold an item that is too new for its model
@pytest.mark.parametrize(("model", "strategy"), [("comirec-dr:d=8", IMSR), ("sasrec:d=8", FAST), ("mf:d=8", FAST)])
def test_exported_ids_and_vectors_give_the_lists_of_the_version(
    model: str, strategy: str, n: int, tmp_path: Path
) -> None:
    version = version_of(tmp_path, model, strategy, n)
    if n == 1:
        assert version.served.state.model.n_items < len(version.served.items)
    about = export_version(version, tmp_path / "out")
    assert about == json.loads((tmp_path / "out" / "about.json").read_text()) and about["version"] == n
    items_ID, vectors_SD = (np.load(tmp_path / "out" / f"{name}_vectors.npy") for name in ("item", "user"))
    users, items = (pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("users", "items"))
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    index.nprobe = index.nlist
    served = version.served
    for user in users.sample(20, seed=0).iter_rows(named=True):
        user_KD = vectors_SD[user["first"] : user["first"] + user["vectors"]]
        scores_I = (user_KD @ items_ID.T).max(0)
        request = resolve_request(served, ListRequest(k=5, exclude_seen=False))
        best = top_items(served, served.users.rows(pl.Series([user["id"]])), request)
        assert scores_I[best["item"].to_numpy() - 1] == pytest.approx(best["score"].to_numpy(), abs=1e-5)
        assert np.sort(scores_I)[::-1][:5] == pytest.approx(best["score"].to_numpy(), abs=1e-5)
        assert items["id"][int(best["item"][0]) - 1] == served.items.ids(torch.tensor([best["item"][0]]))[0]
        _, found = index.search(user_KD, 5)
        assert set(best["item"]) <= set(found.flatten().tolist())


@pytest.mark.parametrize(("model", "strategy"), [("comirec-dr:d=8", IMSR), ("sasrec:d=8", FAST)])
def test_the_user_tower_in_onnx_gives_the_models_vectors(model: str, strategy: str, tmp_path: Path) -> None:
    import onnxruntime

    version = version_of(tmp_path, model, strategy)
    about = export_version(version, tmp_path / "out", with_onnx=True)
    tower = onnxruntime.InferenceSession(str(tmp_path / "out" / "user_tower.onnx"))
    real, source = version.served.state.model, torch.Generator().manual_seed(0)
    for n, k in ((1, 4), (7, 4), (3, 9)):
        history_BT = torch.randint(1, real.n_items, (n, real.spec.length), generator=source)
        history_BT[:, : real.spec.length // 2] = 0  # a shorter history
        stored_BKD = torch.randn(n, k if model.startswith("comirec") else 1, 8, generator=source)
        users_B = torch.arange(1, n + 1)
        inputs = {"users": users_B.numpy(), "history": history_BT.numpy(), "stored": stored_BKD.numpy()}
        [found] = tower.run(None, {name: inputs[name] for name in about["user_tower"]["inputs"]})
        interests_BKD = stored_BKD if model.startswith("comirec") else None
        expected = user_vectors(real, Batch(users_B, history_BT, interests_BKD=interests_BKD))
        assert found == pytest.approx(expected.detach().numpy(), abs=1e-4)


LISTED = ["blend", "item-knn", "markov", "popularity", "repeat-last", "sknn", "user-knn"]


@pytest.mark.parametrize(("model", "with_lists"), [*((name, False) for name in LISTED), ("mf:d=4", True)])
def test_exported_lists_and_neighbours_are_those_of_the_recommender(
    model: str, with_lists: bool, tmp_path: Path
) -> None:
    strategy = FAST if with_lists else "refit:max_passes=2000" if model == "blend" else None
    version = version_of(tmp_path, model, strategy)
    out, recommender = tmp_path / "out", Recommender.load(tmp_path / "s")
    about = export_version(version, out, with_lists=with_lists, k=3)
    assert about["k"] == 3 and about["model"] == model
    lists, popular = pl.read_parquet(out / "lists.parquet"), pl.read_parquet(out / "popular.parquet")
    served = version.served
    expected = recommender.recommend(served.users.frame["id"], k=3)
    assert lists.drop("score").equals(expected.select("user_id", "item_id", "rank", "fallback"))
    assert lists["score"].to_numpy() == pytest.approx(expected["score"].to_numpy(), rel=1e-5)
    assert lists["user_id"].n_unique() == len(served.users)  # everybody has a list
    unknown = recommender.recommend(["nobody"], k=3)
    assert popular.equals(unknown.select("item_id", "rank", "score"))
    assert ("neighbours.parquet" in about["files"]) == (model in ("blend", "item-knn", "markov", "mf:d=4"))
    if "neighbours.parquet" not in about["files"]:
        return
    neighbours = pl.read_parquet(out / "neighbours.parquet")
    assert neighbours["model"].unique(maintain_order=True).to_list() == (
        ["item-knn", "markov"] if model == "blend" else [model]
    )
    own = neighbours.filter(pl.col("model") == neighbours["model"][0])
    expected = recommender.similar_items(served.items.frame["id"][: served.state.model.n_items], k=3)
    assert own.drop("model", "score").equals(expected.select("item_id", "similar_id", "rank"))


def test_an_export_that_is_impossible_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = version_of(tmp_path, "item-knn")
    with pytest.raises(IncompatibleError, match="Model item-knn has no network that computes user vectors"):
        export_version(version, tmp_path / "out", with_onnx=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "b").mkdir()
    version = version_of(tmp_path / "b", "mf:d=4", FAST)
    with pytest.raises(OptionError, match="is not empty"):
        export_version(version, tmp_path / "full")
    monkeypatch.chdir(tmp_path / "b")  # a short path: a word that is longer than a line stays whole
    assert run("export", tmp_path / "b", "out") == 0
    told = capsys.readouterr().out
    assert "items.faiss" in told and max(map(len, told.splitlines())) <= 100  # columns
