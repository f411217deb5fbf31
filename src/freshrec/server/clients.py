"""Who sent a request, and how much each client may still send. Addresses are kept in memory only."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from freshrec.errors import OptionError

MAX_TRACKED_CLIENTS = 10_000  # clients that are remembered; the least recent ones are forgotten first
IPv6_CLIENT_BITS = 64  # one client has all addresses with the same first bits
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_key(address: str) -> str:
    """Return the name under which the requests from an address are counted.

    It is an IPv4 address, or the first 64 bits of an IPv6 address, because one client has all addresses behind them.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:100]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, IPv6_CLIENT_BITS), strict=False))


def parse_proxies(text: str) -> tuple[Network, ...]:
    """Parse `--trusted-proxies`: addresses and networks, separated by commas. Raises OptionError for other words."""
    try:
        return tuple(ipaddress.ip_network(word.strip(), strict=False) for word in text.split(",") if word.strip())
    except ValueError as problem:
        raise OptionError(
            f"--trusted-proxies {text}: {problem}. Write addresses or networks, such as 10.0.0.5,192.168.0.0/24."
        ) from None


def is_in_networks(address: str, networks: tuple[Network, ...]) -> bool:
    """Whether an address is in one of the networks."""
    if not networks:
        return False
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return any((mapped or found) in network for network in networks)


def network_names(networks: tuple[Network, ...]) -> list[str]:
    """Return the networks as text, and those of IPv4 also in the form that a socket of IPv6 shows."""
    mapped = [f"::ffff:{n.network_address}/{96 + n.prefixlen}" for n in networks if n.version == 4]
    return [*map(str, networks), *mapped]


@dataclass
class TokenBucket:
    """Number of requests that a client may still make."""

    tokens: float  # requests left
    updated_at: float  # time of the last change, in seconds


@dataclass
class ClientRates:
    """A token bucket for each client: `burst` requests at once, and `per_s` more each second."""

    per_s: float
    burst: float
    buckets: OrderedDict[str, TokenBucket] = field(default_factory=OrderedDict)

    def has_tokens(self, client: str) -> bool:
        """Whether the client may make a request now."""
        return self._bucket(client).tokens >= 1

    def take(self, client: str) -> bool:
        """Take a token. Returns False if there is none."""
        bucket = self._bucket(client)
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def _bucket(self, client: str) -> TokenBucket:
        """Return the bucket of a client with its tokens as of now."""
        now, bucket = time.monotonic(), self.buckets.pop(client, None)
        bucket = bucket or TokenBucket(self.burst, now)
        bucket.tokens = min(self.burst, bucket.tokens + (now - bucket.updated_at) * self.per_s)
        bucket.updated_at = now
        self.buckets[client] = bucket
        if len(self.buckets) > MAX_TRACKED_CLIENTS:
            self.buckets.popitem(last=False)
        return bucket
