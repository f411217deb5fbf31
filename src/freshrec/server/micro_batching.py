"""Micro-batching of concurrent requests: one batch of lists costs less than separate lists."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from freshrec.recommender.list_request import ListRequest
from freshrec.server import handlers, schemas
from freshrec.server.handlers import LoadedVersion

MAX_BATCH_USERS = 32  # largest number of users in a batch
MAX_BATCH_EVENTS = 10_000  # a user with more past events gets a worker thread, so that the others do not wait
UserLists = list[schemas.UserList]
RunInWorker = Callable[[Callable[[], UserLists]], Awaitable[UserLists]]  # runs a function in a worker thread


@dataclass(eq=False)
class PendingBatch:
    """Users with the same request to the same version, and the task that will compute their lists."""

    users: list[int | str] = field(default_factory=list)
    lists: asyncio.Task[UserLists] = field(init=False)


class MicroBatcher:
    """Collect the requests that arrive while a batch runs into the next batch."""

    def __init__(self, run_in_worker: RunInWorker) -> None:
        self.run_in_worker = run_in_worker
        self._batch_lock = asyncio.Lock()
        self._pending: dict[tuple[LoadedVersion, ListRequest], PendingBatch] = {}

    async def recommend(self, version: LoadedVersion, user: int | str, request: ListRequest) -> schemas.UserList:
        """Return the list of one user. Raises the errors of `handlers.recommend`."""
        if handlers.n_past_events(version, user) > MAX_BATCH_EVENTS:
            return (await self.run_in_worker(lambda: handlers.recommend(version, [user], request)))[0]
        key = (version, request)
        batch = self._pending.get(key)
        if batch is None or len(batch.users) == MAX_BATCH_USERS:
            batch = self._pending[key] = PendingBatch()
            batch.lists = asyncio.create_task(self._run_batch(version, request, batch))
        at = len(batch.users)
        batch.users.append(user)
        return (await asyncio.shield(batch.lists))[at]  # a cancelled request must not cancel those of others

    async def _run_batch(self, version: LoadedVersion, request: ListRequest, batch: PendingBatch) -> UserLists:
        """Compute the lists of a batch once the batch before it is done."""
        async with self._batch_lock:
            if self._pending.get((version, request)) is batch:  # no request can join from now on
                del self._pending[version, request]
            if version.search_info.how == "exact":  # it takes long and releases the interpreter lock
                return await self.run_in_worker(lambda: handlers.recommend(version, batch.users, request))
            return handlers.recommend(version, batch.users, request)
