"""The commands that serve a store over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Annotated, Any

import typer

from freshrec.cli_options import AsJson, StorePath, print_table
from freshrec.errors import OptionError, StateError

Head = Annotated[
    int, typer.Option(min=0, help="Score so many items with the longest vectors first, where there are more; 0: off.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]


def serve(
    store: StorePath = Path("store"),
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone unless told.")] = "127.0.0.1",
    port: Port = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with a token: whoever asks must send it as `Authorization: Bearer`.")
    ] = None,
    rate: Annotated[int, typer.Option(min=0, help="Requests of a client in a second; 0: any number.")] = 500,
    threads: Annotated[int, typer.Option(min=1, help="Of the numerical libraries.")] = 1,
    exact: Annotated[int, typer.Option(min=0, help="Up to so many items all are scored; above, an index.")] = 50_000,
    floor: Annotated[float, typer.Option(min=0, max=1, help="The recall@20 that an index must reach.")] = 0.98,
    head: Head = 16_384,
) -> None:
    """Answer over HTTP from the live version, and from clicks as they come; follow promotions and rollbacks."""
    try:
        import uvicorn

        from freshrec.serve.http import Service, app_of, log
    except ImportError as missing:
        raise OptionError(f'serving needs more libraries ({missing.name}); pip install "freshrec[serve]".') from None
    import faiss
    import torch

    from freshrec.serve.guard import Rules
    from freshrec.serve.index import Limits
    from freshrec.serve.live import Live, be_even
    from freshrec.store.versions import open_store

    be_even()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    made = open_store(store)
    live = Live(made, log, Limits(exact, floor, head))
    live.begin()
    service = Service(live, Rules(token_of(token_file), rate=rate), lambda user: erased(store, user))
    config = uvicorn.Config(
        app_of(service), host, port, access_log=False, log_level="warning", server_header=False,
        timeout_graceful_shutdown=10, timeout_keep_alive=75, limit_concurrency=1000, lifespan="on",
    )  # fmt: skip
    server = uvicorn.Server(config)
    with config.bind_socket() as socket:
        socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)  # or the second packet of an answer waits 40 ms for an ACK
        log(f"listening on http://{socket.getsockname()[0]}:{socket.getsockname()[1]}")
        server.run([socket])


def export(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new one.")],
    store: StorePath = Path("store"),
    version: Annotated[int | None, typer.Option("--version", help="Another one than the live one.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also what makes vectors of histories, as ONNX.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write ids, vectors and an index of a version for other programs: Parquet, npy, faiss, ONNX."""
    from freshrec.serve import export as exporting
    from freshrec.serve.index import ALL
    from freshrec.serve.live import loaded
    from freshrec.store.versions import open_store

    made = open_store(store)
    about = made.manifest(made.live if version is None else version)
    told = exporting.export(loaded(made, about, ALL), out, onnx)
    files = ", ".join(told["files"])
    typer.echo(json.dumps(told) if as_json else f"version {about.id} in {out}: {files}; about.json says what they are")


bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")


@bench.command("serve")
def bench_serve(
    store: StorePath = Path("store"),
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second, at random moments.")] = 20.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 20.0,
    k: Annotated[int, typer.Option("--k", "-k", help="Items of a list.")] = 20,
    exact: Annotated[int, typer.Option(min=0, help="As in `freshrec serve`.")] = 50_000,
    head: Head = 16_384,
    threads: Annotated[int, typer.Option(min=1, help="As in `freshrec serve`.")] = 1,
    swap: Annotated[bool, typer.Option("--swap", help="Move the live pointer away and back meanwhile.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a server of the store, ask it for lists whether or not it keeps up, and print how it bore that."""
    from freshrec.serve.bench import measured

    options = ("--exact", str(exact), "--head", str(head), "--threads", str(threads))
    told = measured(store, rate, seconds, k, options, swap)
    if as_json:
        typer.echo(json.dumps(told))
        return
    print_table(("", ""), [(name.replace("_", " "), str(value)) for name, value in told.items()])


def token_of(path: Path | None) -> str:
    """The token in a file; "" without one. OptionError where it is none."""
    if path is None:
        return ""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as why:
        raise OptionError(f"the token cannot be read from {path} ({type(why).__name__}).") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise OptionError(f"the token in {path} is no token; write at least 16 letters and digits, in one line.")
    return token


def erased(store: Path, user: str) -> dict[str, Any]:
    """`freshrec erase`, in a process that may learn. StateError where it fails."""
    command = [
        sys.executable,
        "-m",
        "freshrec.cli",
        "erase",
        "--store",
        str(store),
        "--wait",
        "1m",
        "--json",
        "--",
        user,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise StateError(done.stderr.strip().splitlines()[-1].removeprefix("error: ") or "the user was not erased.")
    receipt: dict[str, Any] = json.loads(done.stdout)
    return receipt
