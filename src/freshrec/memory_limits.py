"""How much memory a process may still use, and one error for all ways in which it runs out.

The estimates are lower bounds, measured with `popularity`: who has less memory than that cannot succeed.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from freshrec.errors import OutOfMemoryError

GIB = 2**30
BYTES_PER_ROW = 300  # of a log while it is read and learned; measured: 470, and 1,050 of address space
ADDRESS_SPACE_PER_BYTE = 2  # that a process reserves for a byte of memory
SHORTAGE = re.compile(r"bad_alloc|allocate memory|not enough memory|failed to map segment|memory allocation of")
ADVICE = "Free some memory, raise the limit of the process or container, or use a shorter log."
ADDRESS_SPACE = {"fit": 2.1, "update": 2.1, "validate": 1.0, "list": 0.0}  # GiB that a command reserves at least
OTHER_ADDRESS_SPACE = 1.7


def has_memory_for_rows(n_rows: int) -> bool:
    """Whether a log of `n_rows` rows may fit into the available memory. True if that is not known."""
    available = available_memory()
    return available is None or n_rows * BYTES_PER_ROW <= available


def require_memory_for_rows(n_rows: int, name: str) -> None:
    """Raise OutOfMemoryError if a log of `n_rows` rows certainly needs more memory than there is."""
    if not has_memory_for_rows(n_rows):
        needed, available = n_rows * BYTES_PER_ROW, available_memory() or 0
        raise OutOfMemoryError(
            f"{name} has {n_rows:,} rows, which need at least {needed / GIB:.1f} GiB of memory, but only "
            f"{available / GIB:.1f} GiB are available. {ADVICE}"
        )


def require_address_space(arguments: Sequence[str]) -> None:
    """Raise OutOfMemoryError if the limit of `ulimit -v` is too low for a command. Libraries would abort instead."""
    limit, command = _soft_limit(), next(iter(arguments), "")
    if limit is None or command.startswith("-") or not command or "--help" in arguments:
        return
    needed = ADDRESS_SPACE.get(command, OTHER_ADDRESS_SPACE)
    if limit < needed * GIB:
        raise OutOfMemoryError(
            f"The limit of address space (ulimit -v) is {limit / GIB:.1f} GiB, but `freshrec {command}` needs at least "
            f"{needed:.1f} GiB. Raise the limit."
        )


def available_memory() -> int | None:
    """Return how many bytes this process may still use: in the machine, its cgroup and its limit. None = unknown."""
    found = [_machine(), _cgroup(Path("/sys/fs/cgroup")), _address_space()]
    return min((n_bytes for n_bytes in found if n_bytes is not None), default=None)


@contextmanager
def naming_memory_shortage() -> Iterator[None]:
    """Turn every failed request for memory into an OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError, OSError) as problem:
        if not isinstance(problem, MemoryError) and not SHORTAGE.search(str(problem)):
            raise
        available = available_memory()
        left = "" if available is None else f" {max(available, 0) / GIB:.1f} GiB are available now."
        raise OutOfMemoryError(f"There is not enough memory.{left} {ADVICE}") from problem


def _machine() -> int | None:
    """Return the free memory of the machine, with its swap space."""
    lines = re.findall(r"^(MemAvailable|SwapFree): +(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    sizes = {name: int(kib) * 1024 for name, kib in lines}
    return sizes["MemAvailable"] + sizes.get("SwapFree", 0) if "MemAvailable" in sizes else None


def _cgroup(folder: Path) -> int | None:
    """Return what is left of the limit of a container (cgroup version 2). Cached files do not count as used."""
    limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return None
    cached = re.search(r"^file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return int(limit) - int(used) + (int(cached[1]) if cached else 0)


def _address_space() -> int | None:
    limit, pages = _soft_limit(), _read(Path("/proc/self/statm")).split()
    if limit is None or not pages:
        return None
    return (limit - int(pages[0]) * resource.getpagesize()) // ADDRESS_SPACE_PER_BYTE


def _soft_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
