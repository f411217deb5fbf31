"""Micro-batching: lists are the same as without it, few batches are needed, and an error affects one request only."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import stored

from freshrec.errors import LogError
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.search import SearchOptions
from freshrec.server import handlers, schemas
from freshrec.server.handlers import LoadedVersion
from freshrec.server.live_version import load_version
from freshrec.server.micro_batching import MAX_BATCH_USERS, MicroBatcher, UserLists
from freshrec.store.versions import open_store

IMSR = "imsr:fit.base_epochs=1:fit.epochs=1"


async def in_turn(work: Callable[[], UserLists]) -> UserLists:
    """What a worker does, here."""
    return work()


def version_of(folder: Path, exact: int) -> LoadedVersion:
    store = open_store(folder / "s")
    return load_version(store, store.manifest(store.live), SearchOptions(exact_max_items=exact))


@pytest.mark.parametrize(
    ("model", "strategy", "exact"), [("comirec-dr:d=8", IMSR, 0), ("comirec-dr:d=8", IMSR, 99), ("blend", None, 0)]
)
def test_lists_of_a_batch_equal_lists_of_single_requests(
    model: str, strategy: str | None, exact: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, day, _ = stored(tmp_path, model, strategy)
    version = version_of(tmp_path, exact)
    users = day["user_id"].unique(maintain_order=True).to_list()
    wants = [(user, ListRequest(k=5 + nth % 2)) for nth, user in enumerate(users[:50] + ["a stranger"])]
    alone = [handlers.recommend(version, [user], request)[0] for user, request in wants]
    goes, recommend = list[int](), handlers.recommend

    def counted(version: LoadedVersion, users: list[int | str], request: ListRequest) -> UserLists:
        goes.append(len(users))
        return recommend(version, users, request)

    monkeypatch.setattr(handlers, "recommend", counted)

    async def all_at_once() -> list[schemas.UserList]:
        together = MicroBatcher(in_turn)
        return await asyncio.gather(*(together.recommend(version, *want) for want in wants))

    for mine, theirs in zip(asyncio.run(all_at_once()), alone, strict=True):
        assert (mine.user_id, mine.fallback) == (theirs.user_id, theirs.fallback)
        assert [one.item_id for one in mine.items] == [one.item_id for one in theirs.items]
        assert [one.score for one in mine.items] == pytest.approx([one.score for one in theirs.items], rel=1e-5)
    assert sorted(goes) == [25, 26]


def test_more_users_than_a_batch_holds_need_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, "popularity", None)
    version, goes, recommend = version_of(tmp_path, 0), list[int](), handlers.recommend

    def counted(version: LoadedVersion, users: list[int | str], request: ListRequest) -> UserLists:
        goes.append(len(users))
        return recommend(version, users, request)

    monkeypatch.setattr(handlers, "recommend", counted)

    async def all_at_once() -> list[schemas.UserList]:
        together = MicroBatcher(in_turn)
        return await asyncio.gather(
            *(together.recommend(version, "x", ListRequest()) for _ in range(2 * MAX_BATCH_USERS + 3))
        )

    assert len(asyncio.run(all_at_once())) == 2 * MAX_BATCH_USERS + 3
    assert sorted(goes) == [3, MAX_BATCH_USERS, MAX_BATCH_USERS]


def test_a_wrong_or_cancelled_request_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, day, _ = stored(tmp_path, "popularity", None)
    version = version_of(tmp_path, 0)
    row_of = handlers.user_row

    def picky(version: LoadedVersion, user: int | str) -> int:
        if user == "wrong":
            raise LogError("no id")
        return row_of(version, user)

    monkeypatch.setattr(handlers, "user_row", picky)

    async def some() -> list[schemas.UserList | BaseException]:
        together = MicroBatcher(in_turn)
        asking = [
            asyncio.create_task(together.recommend(version, user, ListRequest()))
            for user in (day["user_id"][0], "wrong", day["user_id"][1])
        ]
        await asyncio.sleep(0)
        asking[0].cancel()
        return await asyncio.gather(*asking, return_exceptions=True)

    gone, wrong, right = asyncio.run(some())
    assert isinstance(gone, asyncio.CancelledError)
    assert isinstance(wrong, LogError)
    assert isinstance(right, schemas.UserList)
    assert right.user_id == day["user_id"][1]
