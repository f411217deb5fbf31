"""The names under which a server answers. They protect the users of a browser from pages of other sites.

A page of another site can make its own name point to this machine (DNS rebinding). The browser then sends that name in
the header `Host`. A request from a page of another site names that site in `Origin`. Both are compared with the names
that the operator allows.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from freshrec.errors import OptionError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
HOST_PATTERN = re.compile(r"(\[[0-9a-f:.]+(%[\w.~-]+)?\]|[^\[\]:/@\s]+)(:\d{0,5})?")
NAME_PATTERN = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]{0,252})")


@dataclass(frozen=True)
class AllowedHosts:
    """The names under which a server answers."""

    names: frozenset[str]  # in lower case; "*.example.com" stands for all names below example.com
    allows_addresses: bool = False  # also all addresses: a name of another site is none
    allows_all: bool = False

    def allows(self, header: str) -> bool:
        """Whether the value of a `Host` header, with or without a port, is allowed."""
        if self.allows_all:
            return True
        name = host_name(header)
        if name is None:
            return False
        if name in self.names or name.endswith(".localhost"):
            return True
        if any(name.endswith(pattern[1:]) for pattern in self.names if pattern.startswith("*.")):
            return True
        return self.allows_addresses and _is_address(name)

    def allows_origin(self, header: str) -> bool:
        """Whether the value of an `Origin` header is allowed. `null`, which any page can send, is not."""
        scheme, separator, host = header.strip().lower().partition("://")
        return self.allows_all or (bool(separator) and scheme in ("http", "https") and self.allows(host))

    def __str__(self) -> str:
        if self.allows_all:
            return "all names"
        shown = [f"[{name}]" if ":" in name else name for name in sorted(self.names)]
        return ", ".join([*shown, *(["all IP addresses"] if self.allows_addresses else [])])


def make_allowed_hosts(listen: str, words: str = "") -> AllowedHosts:
    """Return the names of a server that listens on the address `listen`. `words`: the value of `--allowed-hosts`.

    These are `words`, the names of this machine for itself, and `listen`. If it listens on all addresses, these are all
    addresses and the name of the machine. Raises OptionError for a word that is no name.
    """
    given = [word.strip() for word in words.split(",") if word.strip()]
    names = {*LOOPBACK_NAMES, *(_parse_name(word) for word in given if word != "*")}
    address = host_name(f"[{listen}]" if ":" in listen else listen)
    listens_everywhere = address in ("0.0.0.0", "::", "")  # noqa: S104
    names |= {socket.gethostname().lower()} if listens_everywhere else {address} if address else set()
    return AllowedHosts(frozenset(names), listens_everywhere, "*" in given)


def host_name(header: str) -> str | None:
    """Return the name in a `Host` header: in lower case, without port, brackets and last dot. None if invalid."""
    found = HOST_PATTERN.fullmatch(header.strip().lower())
    if found is None:
        return None
    name = found[1]
    if name.startswith("["):
        try:
            return str(ipaddress.IPv6Address(name[1:-1].partition("%")[0]))
        except ValueError:
            return None
    return name.removesuffix(".") or None


def is_local(listen: str) -> bool:
    """Whether only this machine can connect to a server that listens on this address."""
    name = host_name(f"[{listen}]" if ":" in listen else listen)
    return name == "localhost" or (_is_address(name or "") and ipaddress.ip_address(name or "").is_loopback)


def header_values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    """Return all values of a header of a request."""
    return [value.decode("latin-1") for key, value in headers if key == name]


def _parse_name(word: str) -> str:
    """Return a word of `--allowed-hosts` as a name. Raises OptionError if it is none."""
    name = word.lower().removesuffix(".")
    if _is_address(name.strip("[]")):
        return str(ipaddress.ip_address(name.strip("[]")))
    if not NAME_PATTERN.fullmatch(name):
        raise OptionError(
            f"--allowed-hosts: {word} is not a name. Write names without http:// and without a port, "
            "such as shop.example.com or *.example.com."
        )
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
