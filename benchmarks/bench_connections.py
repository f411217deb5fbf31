"""Answers of a server while 1,500 idle connections are open: the slowest of `/health/live`, and the growth of the log.

Opens the connections from 127.0.0.1, opens those that the server closes again, and asks ten times a second from
127.0.0.2. Prints one JSON line.
"""

import argparse
import contextlib
import http.client
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from freshrec.cli.app import main as run_command
from freshrec.data.synthetic import make_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=1_500)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, arguments.connections + 500), hard))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log, store, lines = (Path(folder) / name for name in ("log.parquet", "store", "log.jsonl"))
        world = make_world("drift", users=50, items=30, events=1_000).log.frame
        world.select("user_id", "item_id", timestamp="time").write_parquet(log)
        with contextlib.redirect_stdout(None):
            run_command(["fit", str(log), "--store", str(store), "--model", "popularity"])
        command = [sys.executable, "-m", "freshrec", "serve", "--store", str(store), "--port", "0"]
        server = subprocess.Popen(command, stderr=stack.enter_context(lines.open("wb")))
        stack.callback(server.kill)
        while b"listening on" not in lines.read_bytes():
            time.sleep(0.05)
        port = int(lines.read_text().partition("listening on http://")[2].split('"')[0].rpartition(":")[2])
        started_bytes, slowest_s, n_answers = lines.stat().st_size, 0.0, 0
        idle: list[socket.socket] = []
        end_s = time.monotonic() + arguments.seconds
        while time.monotonic() < end_s:
            n_new = 150 if len(idle) < arguments.connections else 20  # later ones replace those that were closed
            idle += [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(n_new)]
            for closed in idle[: max(0, len(idle) - arguments.connections)]:
                closed.close()
            idle = idle[-arguments.connections :]
            began_s = time.perf_counter()
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=5, source_address=("127.0.0.2", 0))
            client.request("GET", "/health/live")
            assert client.getresponse().status == 200
            client.close()
            slowest_s, n_answers = max(slowest_s, time.perf_counter() - began_s), n_answers + 1
            time.sleep(0.1)
        found = {
            "benchmark": "connections",
            "connections": len(idle),
            "answers": n_answers,
            "slowest_ms": round(slowest_s * 1000, 1),
            "log_bytes": lines.stat().st_size - started_bytes,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
