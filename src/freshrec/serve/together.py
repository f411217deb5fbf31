"""Lists for those who ask at the same moment, made in one go: a list alone costs more than its share of many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from freshrec.serve import answers, asked
from freshrec.serve.answers import Version
from freshrec.serve.list_request import ListRequest

MOST = 32  # users in one go
Lists = list[asked.Listed]
Run = Callable[[Callable[[], Lists]], Awaitable[Lists]]  # do something in a worker


@dataclass(eq=False)
class Group:
    """Users who want the same of one version, and their lists to come."""

    users: list[int | str] = field(default_factory=list)
    lists: asyncio.Task[Lists] = field(init=False)


class Together:
    """Who asks while others are being answered is answered with all who ask then."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._turn = asyncio.Lock()
        self._waiting: dict[tuple[Version, ListRequest], Group] = {}

    async def ask(self, version: Version, user: int | str, request: ListRequest) -> asked.Listed:
        """The list of one user. What `answers.recommend` raises."""
        answers.row_of(version, user)  # LogError for what cannot be an id, before others are asked with it
        key = (version, request)
        group = self._waiting.get(key)
        if group is None or len(group.users) == MOST:
            group = self._waiting[key] = Group()
            group.lists = asyncio.create_task(self._answer(version, request, group))
        at = len(group.users)
        group.users.append(user)
        return (await asyncio.shield(group.lists))[at]  # though this one may go, the others stay

    async def _answer(self, version: Version, request: ListRequest, group: Group) -> Lists:
        async with self._turn:
            if self._waiting.get((version, request)) is group:  # nobody can join any more
                del self._waiting[version, request]
            if version.searching.how == "exact":  # it is long, and outside Python
                return await self.run(lambda: answers.recommend(version, group.users, request))
            return answers.recommend(version, group.users, request)
