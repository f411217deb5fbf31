"""The commands that serve a store over HTTP."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY, socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshrec.cli.options import AllowImport, AsJson, SignKeyFile, StorePath
from freshrec.cli.output import print_table, print_wrapped
from freshrec.errors import OptionError, StateError
from freshrec.recommender.progress import show_progress
from freshrec.user_modules import ALLOW_IMPORT

if TYPE_CHECKING:
    import uvicorn

    from freshrec.server.connections import ConnectionLimits
    from freshrec.server.hosts import AllowedHosts

LongestFirstOption = Annotated[
    int, typer.Option(min=0, help="Number of items with the longest vectors that are scored first (0 = off).")
]
HostOption = Annotated[str, typer.Option(help="Address to listen on. By default only this machine can connect.")]
TokenOption = Annotated[
    Path | None, typer.Option(help="File with a token that clients must send as `Authorization: Bearer TOKEN`.")
]
ExactMaxItemsOption = Annotated[
    int, typer.Option(min=0, help="Score all items up to this catalog size, and use an index above it.")
]
AllowedHostsOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="Host names that clients use for this server, besides localhost and the address of --host (* = all).",
    ),
]
TrustedProxiesOption = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS,...",
        help="Addresses of proxies whose header X-Forwarded-For names the client. By default, the header is ignored.",
    ),
]
MaxConnectionsOption = Annotated[int, typer.Option(min=1, help="Maximum number of open connections.")]
MaxPerClientOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of open connections of one client address; proxies are exempt.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port (0 = any free port).")]


def serve(
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    token_file: TokenOption = None,
    rate: Annotated[int, typer.Option(min=0, help="Maximum requests per second and client (0 = no limit).")] = 500,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the numerical libraries.")] = 1,
    exact_max_items: ExactMaxItemsOption = 50_000,
    min_recall: Annotated[float, typer.Option(min=0, max=1, help="Minimum recall@20 of the index (0 to 1).")] = 0.98,
    n_longest: LongestFirstOption = 16_384,
    allowed_hosts: AllowedHostsOption = "",
    trusted_proxies: TrustedProxiesOption = "",
    max_connections: MaxConnectionsOption = 1000,
    max_connections_per_client: MaxPerClientOption = 250,
) -> None:
    """Serve recommendations of the live version over HTTP. New clicks, promotions and rollbacks take effect at once."""
    try:
        from freshrec.server.app import create_app
        from freshrec.server.connections import ConnectionLimits, make_server, run_server
        from freshrec.server.log import log_errors_without_text, log_line
        from freshrec.server.service import Service
    except ImportError as missing:
        raise OptionError(f'Serving needs the library {missing.name}. Run pip install "freshrec[serve]".') from None
    import faiss
    import torch

    from freshrec.recommender.search import SearchOptions
    from freshrec.server.clients import parse_proxies
    from freshrec.server.hosts import is_local, make_allowed_hosts
    from freshrec.server.live_version import LiveVersion
    from freshrec.server.memory import tune_memory
    from freshrec.server.middleware import ServerLimits
    from freshrec.store.versions import open_store

    hosts, proxies = make_allowed_hosts(host, allowed_hosts), parse_proxies(trusted_proxies)
    connection_limits = ConnectionLimits(max_connections, max_connections_per_client, trusted_proxies=proxies)
    tune_memory()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    live = LiveVersion(
        open_store(store, sign_key_file), log_line, SearchOptions(exact_max_items, min_recall, n_longest)
    )
    live.start()
    limits = ServerLimits(read_token(token_file), max_requests_per_s=rate, allowed_hosts=hosts)
    service = Service(live, limits, lambda user: erase_in_subprocess(store, user, allow_import or (), sign_key_file))
    config = make_config(create_app(service), host, port, connection_limits)
    log_errors_without_text(logging.getLogger("uvicorn.error"))
    with listening_socket(config) as opened:
        connection_limits = describe_limits(connection_limits, hosts, not limits.token and not is_local(host), log_line)
        address, port = opened.getsockname()[:2]
        log_line(f"listening on http://{f'[{address}]' if ':' in address else address}:{port}")
        run_server(*make_server(config, opened, connection_limits, service.metrics, log_line))


def make_config(app: Any, host: str, port: int, limits: ConnectionLimits) -> uvicorn.Config:
    """Return the options of uvicorn. `server.connections` limits its connections, so uvicorn does not."""
    import uvicorn

    from freshrec.server.clients import network_names

    return uvicorn.Config(
        app,
        host,
        port,
        access_log=False,
        log_level="error",  # a warning would be a line for each invalid request
        server_header=False,
        proxy_headers=bool(limits.trusted_proxies),
        forwarded_allow_ips=network_names(limits.trusted_proxies),
        timeout_graceful_shutdown=10,
        timeout_keep_alive=75,
        lifespan="on",
        loop="asyncio",
        http="h11",
        ws="none",
    )


def describe_limits(
    limits: ConnectionLimits, hosts: AllowedHosts, is_open: bool, log_line: Callable[[str], object]
) -> ConnectionLimits:
    """Log who can connect and under which names. Return the limits, reduced to what the system allows."""
    from freshrec.server.connections import limit_to_descriptors

    log_line(f"Clients reach this server as {hosts}. For other host names, use --allowed-hosts.")
    if is_open:
        log_line("There is no token, so everybody who can connect reads the events of all users. Use --token-file.")
    n_connections = limit_to_descriptors(limits)
    if n_connections < limits.max_connections:
        log_line(f"The limit of open files allows {n_connections} connections only. Raise it with `ulimit -n`.")
    return replace(limits, max_connections=n_connections)


def listening_socket(config: uvicorn.Config) -> socket:
    """Open a socket that accepts connections at once. The server answers them as soon as it runs."""
    opened = config.bind_socket()
    opened.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)  # otherwise the second packet of a response waits 40 ms for an ACK
    opened.listen(config.backlog)  # uvicorn listens only after its start-up and refuses earlier connections
    return opened


def export(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the files.")],
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    version: Annotated[int | None, typer.Option("--version", help="Version to use (default: the live one).")] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also export the network that computes user vectors from histories, as ONNX.")
    ] = False,
    lists: Annotated[
        bool, typer.Option("--lists", help="Also export lists and neighbours. Models without vectors always do.")
    ] = False,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Items per list, and neighbours per item.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Export a version for other programs, as Parquet, npy, faiss and ONNX files.

    A model with vectors, such as comirec-dr or sasrec: ids, vectors and an index. Any other model, such as the default:
    the list of each user, and the neighbours of each item. ONNX needs a model with vectors (exit code 5).
    """
    from freshrec.recommender.search import EXACT_SEARCH
    from freshrec.server.export import export_version
    from freshrec.server.live_version import load_version
    from freshrec.store.versions import open_store

    opened_store = open_store(store, sign_key_file)
    manifest = opened_store.manifest(opened_store.live if version is None else version)
    loaded = load_version(opened_store, manifest, EXACT_SEARCH)
    with show_progress(not as_json, with_lines=False):
        summary = export_version(loaded, out, onnx, lists, k)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    files = ", ".join(summary["files"])
    print_wrapped(f"Exported version {manifest.id} to {out}: {files}. about.json describes the files.")


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")


@bench.command("serve")
def bench_serve(
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second, at random times.")] = 20.0,
    seconds: Annotated[float, typer.Option(min=1, help="Duration in seconds.")] = 20.0,
    k: Annotated[int, typer.Option("--k", "-k", help="Number of items per list.")] = 20,
    exact_max_items: Annotated[int, typer.Option(min=0, help="See `freshrec serve`.")] = 50_000,
    n_longest: LongestFirstOption = 16_384,
    threads: Annotated[int, typer.Option(min=1, help="See `freshrec serve`.")] = 1,
    swap: Annotated[
        bool, typer.Option("--swap", help="Change the live version and change it back during the measurement.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start a server of the store, send requests at a fixed rate, and report latency and errors."""
    from freshrec.server.benchmark import run_benchmark
    from freshrec.store.versions import open_store

    options = (
        *[word for module in allow_import or () for word in (ALLOW_IMPORT, module)],
        *key_option(sign_key_file),
        *("--exact-max-items", str(exact_max_items), "--n-longest", str(n_longest), "--threads", str(threads)),
    )
    report = run_benchmark(open_store(store, sign_key_file), rate, seconds, k, options, swap)
    if as_json:
        typer.echo(json.dumps(report))
        return
    print_table(("", ""), [(name.replace("_", " "), str(value)) for name, value in report.items()])


def read_token(path: Path | None) -> str:
    """Read the token in a file; "" without a file. Raises OptionError if it is not a valid token."""
    if path is None:
        return ""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise OptionError(
            f"The token file {path} cannot be read ({type(problem).__name__}). Check the path and its permissions."
        ) from None
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise OptionError(f"The token in {path} is not valid. Write at least 16 letters and digits in one line.")
    return token


def key_option(sign_key_file: Path | None) -> tuple[str, ...]:
    """Return the words that pass the key of a store on to another command."""
    return () if sign_key_file is None else ("--sign-key-file", str(sign_key_file))


def erase_in_subprocess(
    store: Path, user: str, allowed_modules: Sequence[str] = (), sign_key_file: Path | None = None
) -> dict[str, Any]:
    """Run `freshrec erase` in a subprocess, because it needs the training code. Raises StateError if it fails."""
    imports = [word for module in allowed_modules for word in (ALLOW_IMPORT, module)]
    options = (*imports, *key_option(sign_key_file), "--stdin", "--store", str(store), "--wait", "1m", "--json")
    command = [sys.executable, "-P", "-m", "freshrec", "erase", *options]  # -P: import nothing from the current folder
    process = subprocess.run(command, input=f"{user}\n", capture_output=True, encoding="utf-8", timeout=3600)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["The user was not erased. Run `freshrec doctor`."]
        raise StateError(lines[-1].removeprefix("error: "))
    receipt: dict[str, Any] = json.loads(process.stdout)
    return receipt
