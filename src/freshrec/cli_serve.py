"""The commands that serve a store over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from freshrec.cli_options import StorePath
from freshrec.errors import OptionError, StateError

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
    from freshrec.serve.live import Live
    from freshrec.store.versions import open_store

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    made = open_store(store)
    live = Live(made, log)
    live.begin()
    service = Service(live, Rules(token_of(token_file), rate=rate), lambda user: erased(store, user))
    config = uvicorn.Config(
        app_of(service), host, port, access_log=False, log_level="warning", server_header=False,
        timeout_graceful_shutdown=10, limit_concurrency=1000, lifespan="on",
    )  # fmt: skip
    server = uvicorn.Server(config)
    with config.bind_socket() as socket:
        log(f"listening on http://{socket.getsockname()[0]}:{socket.getsockname()[1]}")
        server.run([socket])


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
