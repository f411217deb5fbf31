"""The objects that all routes share: live version, limits, metrics and worker threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from freshrec.data.moments import format_time
from freshrec.errors import StateError
from freshrec.forks import require_threads
from freshrec.server import schemas
from freshrec.server.handlers import LoadedVersion
from freshrec.server.live_version import LiveVersion
from freshrec.server.metrics import ServerMetrics
from freshrec.server.micro_batching import MicroBatcher
from freshrec.server.middleware import ServerLimits

T = TypeVar("T")


@dataclass
class Service:
    """The objects that all routes share."""

    live: LiveVersion
    limits: ServerLimits
    erase: Callable[[str], dict[str, Any]]  # erases a user from the store, in a separate process
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "answer"))

    def __post_init__(self) -> None:
        self.batcher = MicroBatcher(self.run_in_worker)

    async def run_in_worker(self, work: Callable[[], T]) -> T:
        """Run `work` in a worker thread, so that health checks are not delayed."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)

    @property
    def version(self) -> LoadedVersion:
        """The live version. StateError until it is loaded, and in a forked process."""
        require_threads()
        if self.live.version is None:
            raise StateError(self.live.problem or "The live version is still being loaded. Try again.")
        return self.live.version

    def count_fallbacks(self, lists: list[schemas.UserList]) -> None:
        """Count the fallbacks of some lists by their reason."""
        for user_list in lists:
            if user_list.fallback:
                self.metrics.fallbacks.labels(user_list.fallback).inc()


def describe_version(service: Service) -> schemas.VersionInfo:
    """Describe the live version for GET /version."""
    version, manifest, newest = service.version, service.version.manifest, service.live.newest_time
    has_clock = version.bundle.read_options.has_clock
    return schemas.VersionInfo(
        version=manifest.id,
        parent=manifest.parent,
        kind=manifest.kind,
        made_at=manifest.made_at,
        live_since=version.live_since,
        model=version.bundle.names[0],
        strategy=version.bundle.names[1],
        sizes=manifest.sizes,
        numbers=manifest.numbers,
        promoted=manifest.promoted,
        reasons=manifest.reasons,
        notes=manifest.notes,
        newest_event=format_time(newest) if newest is not None and has_clock else newest,
        search=asdict(version.search_info),
        has_token=bool(service.limits.token),
    )
