"""Erasing a user: no file of the store holds the id afterwards, and no data by user is left."""

from pathlib import Path

import polars as pl
import pytest
import torch
from test_nightly import ANY, days, learn

from freshrec.cli.app import main
from freshrec.data.catalog import Catalog
from freshrec.data.histories import insert_events
from freshrec.data.log import read_log
from freshrec.errors import StateError
from freshrec.learn.reservoir import Reservoir, TrainingSamples
from freshrec.nightly.erase import erase_user, without_user
from freshrec.nightly.job import NightlyJob
from freshrec.recommender.bundle import new_bundle, read_bundle
from freshrec.recommender.recommender import Recommender
from freshrec.store.versions import create_store, open_store
from freshrec.types import Events, Histories, Interests

GONE = "user-7-who-leaves"
FAST = "fit.base_epochs=1:fit.epochs=1"
MODELS = [
    ("blend", None),
    ("user-knn", None),
    ("stan", None),
    ("mf:d=8", f"spmf:{FAST}"),
    ("mf:d=8", f"sml:{FAST}"),
    ("mf:d=8", f"asmg-gru-full:{FAST}"),
    ("sasrec:d=8", f"ader:exemplars=50:{FAST}"),
    ("sasrec:d=8", f"full:{FAST}"),
    ("comirec-dr:d=8", f"imsr:{FAST}"),
    ("comirec-dr:d=8", f"asmg:{FAST}"),
    ("comirec-dr:d=8", f"sml:{FAST}"),
    ("caser:d=8", f"finetune:{FAST}"),
    ("gru4rec:d=8", f"ader:exemplars=50:{FAST}"),
]


def named() -> list[pl.DataFrame]:
    """A base and two days with text ids of users."""
    name = pl.concat_str(pl.lit("user-"), "user_id", pl.lit("-of-many"))
    return [
        day.with_columns(user_id=pl.when(pl.col("user_id") == 7).then(pl.lit(GONE)).otherwise(name)) for day in days(2)
    ]


def decoded(folder: Path) -> dict[str, str]:
    """Every file of a folder as text: its bytes, and for tables also their rows as CSV."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_bytes().decode("latin-1")
            found[str(path)] = text + (pl.read_parquet(path).write_csv() if path.suffix == ".parquet" else "")
    return found


@pytest.mark.parametrize(("model", "strategy"), MODELS)
def test_no_file_holds_the_id_and_updates_continue(model: str, strategy: str | None, tmp_path: Path) -> None:
    base, one, two = named()
    with create_store(tmp_path / "s") as store:
        NightlyJob(store, ANY).fit_first_version(read_log(base), "base", new_bundle(model, strategy, 0))
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    learn(job, one, "one")
    others = one.filter(pl.col("user_id") != GONE)["user_id"].unique()
    before = Recommender.from_bundle(job.bundle).recommend(others, 5)
    n_events = len(pl.concat([base, one]).filter(pl.col("user_id") == GONE))
    holding = [path for path, text in decoded(tmp_path / "s").items() if GONE in text]
    assert n_events > 5 and len(holding) >= 4  # both versions, both batches
    with job.store.locked():
        receipt = erase_user(job, GONE)
    assert (receipt["events"], receipt["versions"]) == (n_events, [1, 2])
    assert "weights that all users share" in receipt["stays"]
    assert not [path for path, text in decoded(tmp_path / "s").items() if GONE in text]
    after = Recommender.load(tmp_path / "s")
    assert after.recommend([GONE], 3)["fallback"].to_list() == ["unknown user"] * 3
    if model not in ("blend", "user-knn", "stan"):  # these models lose a neighbour
        assert after.recommend(others, 5).equals(before)
    for number in (1, 2):
        recent = read_bundle(job.store.verified_files(number)).served.counts.histories
        empty_U = (recent.offsets_U.diff() == 0)[1:]
        assert int(empty_U.sum()) == 1 and job.store.find_damage(number) == []
    with job.store.locked():
        assert erase_user(job, GONE)["versions"] == []  # nothing is left to erase
    [version] = learn(job, two, "two")
    assert version.id == 3 and GONE in Recommender.load(tmp_path / "s").bundle.served.users.frame["id"]


def test_users_whose_ids_are_numbers_are_erased_one_after_the_other(tmp_path: Path) -> None:
    base, one, _ = days(2)
    with create_store(tmp_path / "s") as store:
        NightlyJob(store, ANY).fit_first_version(read_log(base), "base", new_bundle("popularity", None, 0))
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    learn(job, one, "one")
    for user in (7, 3, 5, 9):  # in one process: each rewrites the versions
        n_events = len(pl.concat([base, one]).filter(pl.col("user_id") == user))
        with job.store.locked():
            receipt = erase_user(job, str(user))
        assert receipt["events"] == n_events > 0 and not (job.log.read()["user_id"] == user).any()
        assert 2 in receipt["versions"]
    assert main(["erase", "no-number", "--store", str(tmp_path / "s")]) == 3


def test_the_command_prints_a_receipt_and_deletes_a_damaged_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, one, _ = named()
    with create_store(tmp_path / "s") as store:
        NightlyJob(store, ANY).fit_first_version(read_log(base), "base", new_bundle("popularity", None, 0))
    job = NightlyJob(open_store(tmp_path / "s"), ANY)
    learn(job, one, "one")
    (tmp_path / "s" / "versions" / "1" / "served.safetensors").write_bytes(b"damaged")
    assert main(["erase", GONE, "--store", str(tmp_path / "s")]) == 0
    told = capsys.readouterr().out
    assert "Rewritten versions: 2." in told and "Not erased: weights" in told
    assert max(map(len, told.splitlines())) <= 100  # columns
    with pytest.raises(StateError, match="were deleted"):
        job.store.verified_files(1)
    assert not [path for path, text in decoded(tmp_path / "s").items() if GONE in text]
    job.store.verified_files(2)["served.safetensors"].write_bytes(b"damaged")
    assert main(["erase", "user-1-of-many", "--store", str(tmp_path / "s")]) == 7


def test_everything_stored_by_user_is_erased_by_hand() -> None:
    events = Events.trainable(torch.tensor([1, 2, 1, 3]), torch.tensor([5, 6, 7, 8]))
    histories = insert_events(Histories.empty(), events, 3)[0]
    samples = TrainingSamples(torch.tensor([1, 2, 2]), torch.ones(3, 2), torch.tensor([4, 5, 6]))
    interests = Interests(torch.eye(4), torch.tensor([0, 0, 1, 3, 4]), torch.zeros(4), torch.zeros(4))
    found = without_user({"deep": (events, [histories], interests)}, 2)["deep"]
    assert found[0].items_E.tolist() == [5, 7, 8]
    assert found[1][0].items_R.tolist() == [5, 7, 8] and found[1][0].offsets_U.tolist() == [0, 0, 2, 2, 3]
    assert found[2].vectors_SD.tolist() == torch.eye(4)[[0, 3]].tolist() and found[2].offsets_U.tolist() == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert without_user(samples, 2).items_N.tolist() == [4]
    assert without_user(Reservoir(samples, 3, 90), 2).samples.items_N.tolist() == [4, 4, 4]  # it stays full
    assert without_user(Reservoir(samples[samples.users_N == 2], 3, 90), 2).n_seen == 0
    rows = {"users": torch.ones(4, 2), "items": torch.ones(4, 2)}
    assert without_user(rows, 2)["users"].sum(1).tolist() == [2, 2, 0, 2] and without_user(rows, 2)["items"].sum() == 8


def test_a_catalog_deletes_an_id_but_not_its_row() -> None:
    catalog = Catalog.empty().extend(pl.Series(["a", "b", "c"]), 0).erase_row(2)
    assert catalog.rows(pl.Series(["a", "b", "c"])).tolist() == [1, 0, 3]
    again = Catalog.load(catalog.frame).extend(pl.Series(["b", "a"]), 1)
    assert again.rows(pl.Series(["a", "b", "c"])).tolist() == [1, 4, 3] and again.ids(torch.tensor([2]))[0] is None
    assert catalog.erase_row(1).erase_row(3).rows(pl.Series(["a"])).tolist() == [0]
