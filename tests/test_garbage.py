"""Garbage collection keeps the versions that somebody may go back to, whatever their numbers are."""

from pathlib import Path

import pytest
import serving

from freshrec.cli.app import main
from freshrec.errors import StateError
from freshrec.store.collection import collect_garbage
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, create_store, is_collected, open_store

# A plus makes a version that passes and goes live, and a minus makes one that is refused.
# A star makes one that passes, but the run dies before it goes live.
# Less than rolls back to a version, and greater than promotes it.
# An exclamation mark damages a file of a version, and a question mark damages its manifest.
CASES = [
    # Without rollbacks: the live version and the N before it.
    ("+1 +2 +3 +4", 2, {2, 3, 4}),
    ("+1 +2 +3", 5, {1, 2, 3}),
    # Refused versions were never live, whatever their numbers are.
    ("+1 +2 -3 -4 +5 -6", 1, {2, 5}),
    # 3 is live. Before it, 5 was live; `rollback` goes to 2.
    ("+1 +2 +3 +4 +5 <3", 1, {2, 3, 5}),
    ("+1 +2 +3 +4 +5 <3", 2, {1, 2, 3, 4, 5}),
    # 4 and 5 were bad. After the next night, `rollback` goes to 3, not to 5.
    ("+1 +2 +3 +4 +5 <3 +6", 1, {3, 6}),
    ("+1 +2 +3 +4 +5 <3 +6", 2, {2, 3, 5, 6}),
    # Several rollbacks: 1 is live. Before it, 3 was live, and before that 5. The first version has no parent.
    ("+1 +2 +3 +4 +5 <3 <1", 1, {1, 3}),
    ("+1 +2 +3 +4 +5 <3 <1", 2, {1, 3, 5}),
    ("+1 +2 +3 <1 +4 <1 +5", 1, {1, 5}),
    ("+1 +2 +3 <1 +4 <1 +5", 2, {1, 4, 5}),
    # To and fro: a version counts once, by the last time that it was live.
    ("+1 +2 +3 <2 >3 <2 >3", 1, {2, 3}),
    # A refused version that was promoted with a reason was live. Versions are updated from it.
    ("+1 -2 >2 +3", 1, {2, 3}),
    ("+1 -2 >2 +3 +4 <2", 1, {1, 2, 4}),
    # An older version was promoted instead of rolled back to.
    ("+1 +2 +3 +4 >2", 1, {1, 2, 4}),
    # The next `update` makes 3 live, because its run was interrupted.
    ("+1 +2 *3", 1, {1, 2, 3}),
    # Nobody can go back to a damaged version, so it does not count. Its files stay, because a backup may complete them.
    ("+1 +2 +3 !2", 1, {1, 2, 3}),
    ("+1 +2 +3 +4 ?3", 1, {2, 3, 4}),
    ("+1 +2 +3 +4 !1", 2, {2, 3, 4}),
]


def played(folder: Path, steps: str) -> Store:
    """Make a store in which these steps have happened."""
    with create_store(folder) as made:
        for step in steps.split():
            kind, number = step[0], int(step[1:])
            version = made.folder / "versions" / str(number)
            if kind in "+-*":
                parent = made.live if made.moves() else None
                write(made, number, parent, promoted=kind != "-")
            if kind in "+><":
                made.move_pointer(number, {"+": "update", ">": "promote", "<": "rollback"}[kind])  # type: ignore[arg-type]
            elif kind == "!":
                (version / "a").write_text("changed")
            elif kind == "?":
                (version / "manifest.json").write_text("{")
    return open_store(folder)


def write(store: Store, number: int, parent: int | None, promoted: bool) -> None:
    manifest = Manifest(
        id=number, parent=parent, kind="update", recipe={"model": "m"}, spans_seen=1, sizes={"events": 1},
        promoted=promoted, goes_live=promoted,
    )  # fmt: skip
    store.write_version(manifest, lambda folder: (folder / "a").write_text(f"a of {number}"))


@pytest.mark.parametrize(("steps", "keep", "expected"), CASES)
def test_the_versions_that_one_goes_back_to_keep_their_files(
    tmp_path: Path, steps: str, keep: int, expected: set[int]
) -> None:
    store = played(tmp_path / "s", steps)
    gone = collect_garbage(store, keep)
    assert set(store.version_numbers()) - set(gone) == expected
    assert {number for number in store.version_numbers() if not is_collected(store, number)} == expected
    assert all((store.folder / "versions" / str(number) / "a").exists() for number in expected)
    assert collect_garbage(store, keep) == []  # once more deletes nothing


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_one_can_roll_back_as_many_times_as_versions_were_kept(tmp_path: Path, keep: int) -> None:
    """Garbage is collected after each rollback. `rollback` without a number works `keep` times in a row."""
    store = played(tmp_path / "s", "+1 +2 +3 +4 <3 +5 +6 <5 +7 +8 <7")
    collect_garbage(store, keep)
    for _ in range(keep):
        parent = store.manifest(store.live).parent
        assert parent is not None
        store.move_pointer(parent, "rollback")  # verifies all files of the version
        collect_garbage(store, keep)


def test_a_gc_that_was_killed_is_completed_by_the_next_one(tmp_path: Path) -> None:
    store = played(tmp_path / "s", "+1 +2 +3 +4")
    (store.folder / "versions" / "1" / "collected").touch()  # killed before the files were deleted
    assert collect_garbage(store, 1) == [2]
    assert not (store.folder / "versions" / "1" / "a").exists()
    with pytest.raises(StateError, match="deleted by `freshrec gc`"):
        store.move_pointer(1, "rollback")


def test_the_commands_roll_back_after_gc_while_a_server_serves_the_former_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.stored(tmp_path, n=3)  # versions 1, 2 and 3
    shop = ["--store", str(tmp_path / "s")]
    with serving.server(tmp_path) as (client, live):
        live._stop_event.set()  # the server does not look at the store again, so it serves version 3 to the end
        live._watcher.join()
        assert main(["rollback", *shop]) == 0  # to 2
        assert main(["gc", "--keep", "1", *shop]) == 0
        assert "Nothing to delete." in capsys.readouterr().out  # 2 is live, 3 was live, and 1 is its parent
        assert client.get("/recommend/user-1").json()["version"] == 3
        assert client.get("/users/user-1/changes").status_code == 200  # loads version 2, the parent of version 3
        assert main(["rollback", *shop]) == 0  # to 1
        live.refresh()
        assert client.get("/recommend/user-1").json()["version"] == 1
