"""Versions on disk: complete or absent, protected by checksums, and exactly one of them is live."""

import os
import threading
from pathlib import Path

import pytest

from freshrec.errors import BusyError, OptionError, StateError
from freshrec.store import versions
from freshrec.store.collection import collect_garbage
from freshrec.store.manifest import Manifest
from freshrec.store.versions import Store, create_store, open_store


def about(number: int, parent: int | None = None, promoted: bool = True) -> Manifest:
    return Manifest(
        id=number,
        parent=parent,
        kind="update",
        recipe={"model": "m"},
        spans_seen=1,
        sizes={"events": 1},
        promoted=promoted,
        goes_live=promoted,
    )


def write(store: Store, number: int, text: str = "", parent: int | None = None, promoted: bool = True) -> None:
    """Write a version of two files. The second one is always the same."""

    def save(aside: Path) -> None:
        (aside / "a").write_text(text or f"a of {number}")
        (aside / "b").write_text("as ever")

    store.write_version(about(number, parent, promoted), save)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Versions 1, 2 and 3; 3 is live."""
    with create_store(tmp_path / "store") as made:
        for number in (1, 2, 3):
            write(made, number, parent=number - 1 or None)
        made.move_pointer(3, "fit")
    return open_store(tmp_path / "store")


def test_a_store_exists_when_it_is_complete_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), create_store(tmp_path / "store") as made:
        write(made, {}[1])
    assert list(tmp_path.iterdir()) == []
    with create_store(tmp_path / "deep" / "store") as made:
        write(made, 1)
    assert open_store(tmp_path / "deep" / "store").version_numbers() == [1]
    with pytest.raises(OptionError, match="deep is not empty"), create_store(tmp_path / "deep"):
        pass
    with pytest.raises(StateError, match="No version of .* is live yet"):
        _ = open_store(tmp_path / "deep" / "store").live


def test_an_unfinished_version_does_not_exist_and_its_files_are_removed(store: Store) -> None:
    def die(aside: Path) -> None:
        (aside / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_version(about(4), die)
    assert store.version_numbers() == [1, 2, 3] and store.next_number == 4
    with store.locked():
        assert not list(store.folder.glob("versions/.*"))
        write(store, 4)
    assert store.manifest(4).files.keys() == {"a", "b"}


def test_every_changed_byte_is_detected_and_the_last_intact_version_is_named(store: Store) -> None:
    folder = store.folder / "versions" / "3"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), 1 if len(whole) < 100 else 37):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(StateError):
                store.verified_files(3)
        path.write_bytes(whole[:-1])
        with pytest.raises(StateError):
            store.verified_files(3)
        path.write_bytes(whole)  # also of other versions, which share it
        path.unlink()
        with pytest.raises(StateError):
            store.verified_files(3)
        path.write_bytes(whole)
    (folder / "a").write_text("else")
    (store.folder / "versions" / "2" / "a").write_text("else")
    with pytest.raises(StateError, match=r"Version 3 .* is damaged \(a has changed\)\. Roll back with .*rollback 1 "):
        store.verified_files(3)
    with pytest.raises(StateError, match="a has changed"):
        store.move_pointer(2, "rollback")
    assert store.live == 3


def test_a_damaged_live_pointer_is_an_error_and_promoting_rebuilds_it(store: Store) -> None:
    (store.folder / "live.json").write_text('{"checksum": "", "content": []}')
    with pytest.raises(
        StateError, match="changed by another program.* choose a live version with `freshrec promote N --store .*`"
    ):
        _ = store.live
    store.move_pointer(2, "promote", "the pointer was damaged")
    assert store.live == 2 and store.moves()[-1].reason == "the pointer was damaged"
    assert [move.to for move in store.moves()] == [1, 2, 3, 2]  # so version 3 is not taken for an interrupted update


def test_a_damaged_manifest_of_an_ancestor_names_the_version_to_roll_back_to(store: Store) -> None:
    (store.folder / "versions" / "2" / "manifest.json").write_text("{")
    with pytest.raises(
        StateError, match=r"ancestor of the live version cannot be read: .*2/manifest.json .* rollback 1 --reason"
    ):
        versions.version_chain(store)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"content": 1}', '{"checksum": 1, "content": {"format": 9}}', "[" * 100_000]
)
def test_a_folder_that_is_not_a_store_is_an_error(text: str, store: Store) -> None:
    (store.folder / "store.json").write_text(text)
    with pytest.raises(StateError):
        open_store(store.folder)
    (store.folder / "versions" / "2" / "manifest.json").write_text(text)
    with pytest.raises(StateError):
        store.manifest(2)
    assert [manifest.id for manifest in store.manifests()] == [1, 3]


def test_a_manifest_in_the_folder_of_another_version_is_an_error(store: Store) -> None:
    text = (store.folder / "versions" / "1" / "manifest.json").read_text()
    (store.folder / "versions" / "2" / "manifest.json").write_text(text)
    with pytest.raises(StateError, match="is the manifest of version 1"):
        store.verified_files(2)


def test_only_one_process_at_a_time_changes_a_store(store: Store) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.locked():
            held.set()
            done.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    with pytest.raises(BusyError, match="Another process"), store.locked():
        pass
    threading.Timer(0.1, done.set).start()
    with store.locked(wait_s=10):
        write(store, 4)
    other.join()
    assert store.version_numbers() == [1, 2, 3, 4]


def test_files_equal_to_those_of_the_parent_are_hard_links(store: Store) -> None:
    one, two = ((store.folder / "versions" / n / "b").stat().st_ino for n in "12")
    assert one == two
    first, second = ((store.folder / "versions" / n / "a").stat().st_ino for n in "12")
    assert first != second


def test_rewriting_a_version_removes_its_former_files(store: Store) -> None:
    with store.locked():
        store.rewrite_version(2, lambda aside: (aside / "a").write_text("anew"))
    files = store.verified_files(2)
    assert files["a"].read_text() == "anew" and files.keys() == {"a"}
    left = [path for path in (store.folder / "versions" / "2").rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == ["a", "manifest.json"]
    assert store.verified_files(3)["b"].read_text() == "as ever"  # was a hard link to the same file


def test_an_interrupted_rewrite_keeps_the_former_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(versions, "write_checksummed", die)
    with pytest.raises(KeyboardInterrupt):
        store.rewrite_version(2, lambda aside: (aside / "a").write_text("anew"))
    assert store.verified_files(2)["a"].read_text() == "a of 2"
    with store.locked():
        assert sorted(path.name for path in (store.folder / "versions" / "2").iterdir()) == ["a", "b", "manifest.json"]


def test_garbage_collection_deletes_the_files_of_old_and_refused_versions_and_keeps_their_manifests(
    store: Store,
) -> None:
    write(store, 4, promoted=False)
    write(store, 5)
    for number in (2, 3, 5):
        store.move_pointer(number, "update")
    store.move_pointer(1, "rollback")
    assert collect_garbage(store, keep=2) == [2, 4]  # 1 is live; before it, 5 and 3 were
    assert [manifest.id for manifest in store.manifests()] == [1, 2, 3, 4, 5]
    for number in (1, 3, 5):
        store.verified_files(number)
    with pytest.raises(StateError, match="deleted by `freshrec gc`"):
        store.verified_files(2)
    assert not (store.folder / "versions" / "2" / "a").exists()
    assert collect_garbage(store, keep=2) == []
    store.move_pointer(5, "promote")
    assert collect_garbage(store, keep=1) == [3] and store.verified_files(1)  # the version that was live before 5


def test_garbage_collection_keeps_versions_that_cannot_be_read(store: Store) -> None:
    (store.folder / "versions" / "1" / "manifest.json").write_text("{")
    assert collect_garbage(store, keep=1) == [] and (store.folder / "versions" / "1" / "a").exists()


def test_a_full_disk_is_an_error_and_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for change in (lambda: write(store, 4), lambda: store.move_pointer(1, "rollback")):
        with pytest.raises(StateError, match=r"cannot be written \(No space left on device\)"):
            change()
    monkeypatch.undo()
    assert store.live == 3 and store.version_numbers() == [1, 2, 3]


def test_foreign_files_and_a_file_system_without_links_do_no_harm(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.folder / "versions" / ".DS_Store").write_text("a file")

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with store.locked():
        write(store, 4, parent=3)
    assert (
        store.verified_files(4)["b"].read_text() == "as ever" and not (store.folder / "versions" / ".DS_Store").exists()
    )


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "", ".", "..", "a/../b", "a/b/c", "x" * 5000])
def test_a_manifest_with_paths_outside_its_folder_is_an_error(path: str, store: Store) -> None:
    whole = store.manifest(3).model_dump()
    whole["files"]["a"]["path"] = path
    versions.write_checksummed(whole, store.folder / "versions" / "3" / "manifest.json")
    with pytest.raises(StateError, match="is not a valid manifest"):
        store.verified_files(3)


def test_a_version_of_a_later_format_is_an_error(store: Store) -> None:
    path = store.folder / "versions" / "3" / "manifest.json"
    versions.write_checksummed(store.manifest(3).model_dump() | {"format": 2, "shards": []}, path)
    with pytest.raises(StateError, match=r"does not know\. Upgrade freshrec"):
        store.verified_files(3)


def test_a_version_cannot_be_its_own_parent(store: Store) -> None:
    folder = store.folder / "versions" / "3"
    versions.write_checksummed(store.manifest(3).model_dump() | {"parent": 3}, folder / "manifest.json")
    with pytest.raises(StateError):
        versions.version_chain(store)


def test_a_version_that_is_rewritten_while_it_is_read_is_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, times = store.manifest(3), []
    store.rewrite_version(3, lambda aside: (aside / "a").write_text("anew"))
    manifest = Store.manifest

    def late(self: Store, number: int) -> Manifest:
        times.append(number)
        return old if len(times) <= 2 else manifest(self, number)

    monkeypatch.setattr(Store, "manifest", late)
    assert store.verified_files(3)["a"].read_text() == "anew"
