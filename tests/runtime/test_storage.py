"""Files on local disks and on object stores: the same behaviour, and never half a file."""

from __future__ import annotations

import os
import pickle
import secrets
from pathlib import Path

import pytest

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Log, Storage


@pytest.fixture(params=["local", "file", "mock"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local folder by path and by URI, and pyarrow's in-memory store (the code path of s3 and gs)."""
    if request.param == "mock":
        return Storage(f"mock://{secrets.token_hex(4)}/runs/a")
    return Storage(f"file://{tmp_path}/a b" if request.param == "file" else tmp_path / "a b")


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write_bytes("deep/er/x", b"one")
    storage.write_bytes("deep/er/x", b"two")
    assert storage.read_bytes("deep/er/x") == b"two"
    assert storage.exists("deep/er/x")
    assert not storage.exists("deep/er")
    assert not storage.exists("deep/er/y")


def test_files_and_folders_are_listed_relative_to_the_storage(storage: Storage) -> None:
    for name in ("a", "b/c", "b/d/e"):
        storage.write_bytes(name, b"")
    assert storage.files() == ["a"]
    assert storage.files(recursive=True) == ["a", "b/c", "b/d/e"]
    assert storage.files("b") == ["b/c"]
    assert storage.folders() == ["b"]
    assert storage.folders("b") == ["b/d"]
    assert storage.files("absent") == storage.folders("absent") == []


def test_files_and_folders_are_deleted_and_absence_is_no_error(storage: Storage) -> None:
    for name in ("a", "b/c", "b/d/e"):
        storage.write_bytes(name, b"")
    storage.delete("b")
    storage.delete("a")
    storage.delete("never/was")
    assert storage.files(recursive=True) == []


def test_a_pickled_storage_opens_the_same_place(storage: Storage) -> None:
    storage.join("sub").write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("sub/x") == b"1"  # noqa: S301 (our own object)


def test_an_absent_file_raises_file_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a//b", "./a", "a\\..\\b", "a\0b", ".."])
def test_names_cannot_leave_the_folder(storage: Storage, name: str) -> None:
    for act in (
        storage.read_bytes,
        storage.exists,
        storage.delete,
        storage.join,
        lambda n: storage.write_bytes(n, b""),
    ):
        with pytest.raises(ValueError, match="inside its folder"):
            act(name)


def test_a_store_that_cannot_be_opened_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"ftp://host/x.*expected a path or a URI"):
        Storage("ftp://host/x")


def test_an_interrupted_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("x", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes("x", b"new")
    monkeypatch.undo()
    assert storage.read_bytes("x") == b"old"
    assert storage.files() == ["x"]


def test_sweep_deletes_only_our_temporary_files(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for name in ("sub/.x.0123456789ab.tmp", "sub/x", "notes.tmp", ".hidden"):
        storage.write_bytes(name, b"")
    assert storage.sweep() == 1
    assert storage.files(recursive=True) == [".hidden", "notes.tmp", "sub/x"]


def test_a_log_keeps_whole_lines_and_drops_a_torn_one(storage: Storage) -> None:
    storage.write_bytes("log", b"one\ntwo\nthr")
    log = Log(storage, "log")
    log.append(b"four")
    assert log.read() == [b"one", b"two", b"four"]
    log.close()
    assert storage.read_bytes("log") == b"one\ntwo\nfour\n"


def test_a_log_can_be_cut_back(storage: Storage) -> None:
    log = Log(storage, "log")
    for word in (b"a", b"b", b"c"):
        log.append(word)
    assert log.keep(lambda line: line != b"b") == 1
    log.append(b"d")
    log.flush()
    assert Log(storage, "log").read() == [b"a", b"c", b"d"]


def test_a_line_cannot_hold_a_line_break(storage: Storage) -> None:
    with pytest.raises(ValueError, match="line break"):
        Log(storage, "log").append(b"a\nb")
