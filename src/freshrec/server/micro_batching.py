"""Micro-batching of concurrent requests: a list alone costs more than its share of a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from freshrec.recommender.list_request import ListRequest
from freshrec.server import handlers, schemas
from freshrec.server.handlers import LoadedVersion

MAX_BATCH_USERS = 32  # users of a batch
UserLists = list[schemas.UserList]
RunInWorker = Callable[[Callable[[], UserLists]], Awaitable[UserLists]]  # do something in a worker


@dataclass(eq=False)
class PendingBatch:
    """Users who want the same of one version, and their lists to come."""

    users: list[int | str] = field(default_factory=list)
    lists: asyncio.Task[UserLists] = field(init=False)


class MicroBatcher:
    """Requests that arrive while a batch runs make up the next batch."""

    def __init__(self, run_in_worker: RunInWorker) -> None:
        self.run_in_worker = run_in_worker
        self._batch_lock = asyncio.Lock()
        self._pending: dict[tuple[LoadedVersion, ListRequest], PendingBatch] = {}

    async def recommend(self, version: LoadedVersion, user: int | str, request: ListRequest) -> schemas.UserList:
        """The list of one user. Raises what `handlers.recommend` raises."""
        handlers.user_row(version, user)  # LogError for what cannot be an id, before it joins a batch
        key = (version, request)
        batch = self._pending.get(key)
        if batch is None or len(batch.users) == MAX_BATCH_USERS:
            batch = self._pending[key] = PendingBatch()
            batch.lists = asyncio.create_task(self._run_batch(version, request, batch))
        at = len(batch.users)
        batch.users.append(user)
        return (await asyncio.shield(batch.lists))[at]  # though this one may go, the others stay

    async def _run_batch(self, version: LoadedVersion, request: ListRequest, batch: PendingBatch) -> UserLists:
        async with self._batch_lock:
            if self._pending.get((version, request)) is batch:  # nobody can join any more
                del self._pending[version, request]
            if version.search_info.how == "exact":  # it is long, and outside Python
                return await self.run_in_worker(lambda: handlers.recommend(version, batch.users, request))
            return handlers.recommend(version, batch.users, request)
