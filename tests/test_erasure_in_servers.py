"""An erased user is unknown in all servers from the start of the erasure on, until they have loaded what remains."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ANY, TOKEN, click, run, server, stored

from freshrec.cli.server import erase_in_subprocess
from freshrec.errors import StateError
from freshrec.nightly import erase as erasing
from freshrec.nightly.erase import erase_user
from freshrec.nightly.job import NightlyJob
from freshrec.server import live_version
from freshrec.server.log import log_errors_without_text
from freshrec.server.middleware import ServerLimits
from freshrec.store.erasures import begin_erasure, complete_erasure, erasures_path, read_erasures
from freshrec.store.versions import open_store

NOON = 1_790_000_000  # seconds, after all of the world's events
OPEN = ServerLimits(max_requests_per_s=0)


def fallback(client: object, user: str) -> str | None:
    return client.get(f"/recommend/{user}").json()["fallback"]  # type: ignore[attr-defined, no-any-return]


def erase_from_command_line(folder: Path, user: str) -> None:
    assert run("erase", folder, user) == 0


def test_the_command_erases_a_user_in_a_running_server(tmp_path: Path) -> None:
    stored(tmp_path)
    with server(tmp_path, OPEN) as (client, live):
        assert fallback(client, "user-1") is None
        erase_from_command_line(tmp_path, "user-1")
        live.refresh()  # the watcher does this every half second
        assert fallback(client, "user-1") == "unknown user"
        assert fallback(client, "user-2") is None


def test_a_user_known_by_clicks_only_is_erased_in_a_running_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path)
    with server(tmp_path, OPEN) as (client, live):
        click(client, "only-here", "item-1", timestamp=NOON)
        assert fallback(client, "only-here") is None
        capsys.readouterr()
        erase_from_command_line(tmp_path, "only-here")
        # no event of the log, one click of the journal, and no version has this user
        assert "erased 0 events from the log and 1 click from the journal" in capsys.readouterr().out
        live.refresh()
        assert fallback(client, "only-here") == "unknown user"
        assert client.get("/users/only-here/interests").status_code == 404


def test_a_user_is_hidden_while_the_erasure_runs_and_clicks_must_wait(tmp_path: Path) -> None:
    stored(tmp_path)
    with server(tmp_path, OPEN) as (client, live):
        begin_erasure(tmp_path / "s", "user-1")
        live.refresh()
        assert fallback(client, "user-1") == "unknown user"
        answer = client.post("/events", json={"events": [{"user_id": "user-1", "item_id": "item-1"}]})
        assert answer.status_code == 409 and "being erased" in answer.json()["detail"]
        assert live.n_swaps == 1  # nothing was loaded again
        complete_erasure(tmp_path / "s", "user-1", was_known=False)
        live.refresh()
        assert fallback(client, "user-1") is None  # no user was erased


def test_an_interrupted_erasure_keeps_a_user_hidden_until_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path)
    store = open_store(tmp_path / "s")
    with server(tmp_path, OPEN) as (client, live):
        with monkeypatch.context() as patch:
            patch.setattr(erasing, "_erase_from_versions", lambda store, user: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                erase_user(NightlyJob(store), "user-1")
        live.refresh()
        assert fallback(client, "user-1") == "unknown user"
        assert len(read_erasures(store.folder).pending) == 1
        assert erase_user(NightlyJob(store), "user-1")["versions"] == [1]
        assert not read_erasures(store.folder).pending


def test_gone_stays_gone_until_a_load_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    with server(tmp_path, ServerLimits(TOKEN, max_requests_per_s=0)) as (client, live):
        client.headers.update({"authorization": f"Bearer {TOKEN}"})
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise MemoryError

            patch.setattr(live_version, "load_version", fail)
            assert client.delete("/users/user-1").json()["versions"] == [1]
            assert "MemoryError" in live.problem
            assert fallback(client, "user-1") == "unknown user"  # the version in memory still has the user
            told = click(client, "user-1", "item-1", timestamp=NOON)  # a new event after the erasure is stored
            assert not told["known"] and not told["folded"] and "erased" in told["why"]
            assert fallback(client, "user-1") == "unknown user"
        live._retry_at_s = 0.0
        live.refresh()
        assert live.problem == ""
        assert client.get("/users/user-1/interests").json()["n_events"] == 1  # the new click, and nothing from before


def test_a_server_that_starts_later_hides_nobody(tmp_path: Path) -> None:
    stored(tmp_path)
    erase_from_command_line(tmp_path, "user-1")
    with server(tmp_path, OPEN) as (client, _):
        assert fallback(client, "user-1") == "unknown user"
        click(client, "user-1", "item-1", timestamp=NOON)  # comes back
        assert fallback(client, "user-1") is None


def test_an_unknown_user_leaves_no_record_and_causes_no_load(tmp_path: Path) -> None:
    stored(tmp_path)
    with server(tmp_path, OPEN) as (client, live):
        erase_from_command_line(tmp_path, "nobody")
        live.refresh()
        assert live.n_swaps == 1
    erasures = read_erasures(tmp_path / "s")
    assert not erasures.pending and not erasures.completed and not erasures.last_number


def test_the_record_holds_no_id_and_a_damaged_one_is_reported(tmp_path: Path) -> None:
    begin_erasure(tmp_path, "anna@example.org")
    complete_erasure(tmp_path, "anna@example.org", was_known=True)
    path = erasures_path(tmp_path)
    assert "anna" not in path.read_text()
    erasures = read_erasures(tmp_path)
    assert erasures.hides("anna@example.org", 0) and not erasures.hides("anna@example.org", 1)
    path.write_text(path.read_text().replace('"last_number": 1', '"last_number": 9'))
    with pytest.raises(StateError, match=r"erasures\.json was changed"):
        read_erasures(tmp_path)


def test_a_number_and_a_text_are_different_users(tmp_path: Path) -> None:
    begin_erasure(tmp_path, 7)
    assert read_erasures(tmp_path).hides(7, 0) and not read_erasures(tmp_path).hides("7", 0)


def test_the_id_is_not_among_the_arguments_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    arguments: list[str] = []
    original = subprocess.run

    def spy(command: list[str], **options: object) -> object:
        arguments.extend(command)
        return original(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", spy)
    assert erase_in_subprocess(tmp_path / "s", "user-1")["versions"] == [1]
    assert "user-1" not in arguments


@pytest.mark.parametrize("arguments", [[], ["user-1", "--stdin"]])
def test_erase_takes_the_id_from_one_place(arguments: list[str], tmp_path: Path) -> None:
    stored(tmp_path)
    assert run("erase", tmp_path, *arguments) == 2


@pytest.mark.parametrize(("text", "reason"), [("", "Standard input is empty"), ("user-1\nuser-2\n", "several lines")])
def test_erase_refuses_standard_input_without_exactly_one_id(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert run("erase", tmp_path, "--stdin") == 2
    assert reason in capsys.readouterr().err


def test_the_text_of_an_exception_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("server")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    log_errors_without_text(logger)
    try:
        raise ValueError("no user anna@example.org")
    except ValueError:
        logger.exception("Exception in ASGI application")
    told = capsys.readouterr().err
    assert "anna" not in told
    assert json.loads(told)["what"].startswith("Internal error: ValueError at test_erasure_in_servers.py:")
    logger.error("An ordinary line.")
    assert "An ordinary line." in capsys.readouterr().err


def test_updates_and_rollbacks_continue_after_an_erasure(tmp_path: Path) -> None:
    stored(tmp_path, n=2)
    erase_from_command_line(tmp_path, "user-1")
    with server(tmp_path, OPEN) as (client, live):
        click(client, "user-2", "item-1", timestamp=NOON)
        assert run("update", tmp_path, *ANY) == 0
        live.refresh()
        assert fallback(client, "user-1") == "unknown user"
