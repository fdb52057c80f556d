"""Changes to a shard: whatever happens, what was acknowledged is there, and searches equal those of a dictionary."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.build import Builder
from raysys.systems.rabtriever.live import LiveShard, compact, settle
from raysys.systems.rabtriever.versions import Root, publish

D, NAMES = 4, [f"d{i}" for i in range(8)]


def vector(value: int) -> np.ndarray:
    """(D,) small whole numbers, so that ties are frequent."""
    return np.random.default_rng(value).integers(-2, 3, D).astype(np.float32)


def make_root(folder: Path, ids: list[str], shards: int = 1, kind: str = "flat") -> Path:
    builder = Builder(folder, "v0", D, "model", shards, kind)  # type: ignore[arg-type]
    rows = np.stack([vector(i) for i in range(len(ids))]) if ids else np.zeros((0, D), np.float32)
    builder.put(0, ids, [f"text {id}" for id in ids], rows)
    builder.finish()
    publish(folder, "v0")
    return folder


class Model:
    """What a shard should hold: an ordered dictionary."""

    def __init__(self, ids: list[str]) -> None:
        self.rows = {id: (f"text {id}", vector(i)) for i, id in enumerate(ids)}

    def put(self, id: str, text: str, z: np.ndarray) -> None:
        self.rows.pop(id, None)
        self.rows[id] = (text, z)

    def check(self, shard: LiveShard) -> None:
        live = shard.version(shard.root.current())
        for id in [*NAMES, "never"]:
            assert live.text(id) == (self.rows[id][0] if id in self.rows else None)
        u = np.stack([vector(1000 + i) for i in range(3)])
        for k in (1, 3, 20):
            found = live.view.search(u, k)
            for i in range(3):
                scored = [(float(u[i] @ z), id, text) for id, (text, z) in self.rows.items()]
                expected = sorted(scored, key=lambda one: -one[0])[:k]  # stable: ties in the order of the dictionary
                got = list(zip(found.scores[i].tolist(), found.ids[i], found.texts[i], strict=True))
                assert got == expected


changes = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 20)), min_size=1, max_size=4)),
    st.tuples(st.just("delete"), st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)),
    st.tuples(st.just("crash"), st.integers(0, 10_000)),
    st.tuples(st.just("compact"), st.just(0)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(changes, max_size=12), st.integers(0, 5))
def test_any_changes_crashes_and_compactions_equal_a_dictionary(steps: list, start: int) -> None:
    """A crash cuts the journal anywhere in a change that was being written and not acknowledged."""
    with tempfile.TemporaryDirectory() as name:
        root = make_root(Path(name), NAMES[:start])
        shard, model, count = LiveShard(root, 0), Model(NAMES[:start]), 0
        for what, value in steps:
            if what == "put":
                rows = list(dict(value).items())
                texts = [f"{id} is {v}" for id, v in rows]
                shard.put([id for id, _ in rows], texts, np.stack([vector(v) for _, v in rows]))
                for (id, v), text in zip(rows, texts, strict=True):
                    model.put(id, text, vector(v))
            elif what == "delete":
                shard.delete(value)
                for id in value:
                    model.rows.pop(id, None)
            elif what == "crash":
                path = shard.journal._path(shard.journal.segment)
                acknowledged = path.stat().st_size
                shard.put(["d0", "d7"], ["never acknowledged", "neither"], np.stack([vector(1), vector(2)]))
                shard.close()
                content = path.read_bytes()
                path.write_bytes(content[: acknowledged + value % (len(content) - acknowledged)])
                shard = LiveShard(root, 0)
            else:
                count += 1
                source = shard.root.current()
                settle(shard.root, f"v{count}", source, [shard.compact(f"v{count}", source)])
            model.check(shard)
        shard.close()
        model.check(again := LiveShard(root, 0))
        again.close()


def test_a_power_cut_that_left_empty_room_at_the_end_loses_nothing(tmp_path: Path) -> None:
    shard = LiveShard(make_root(tmp_path, []), 0)
    shard.put(["a"], ["one"], vector(1)[None])
    path = shard.journal._path(0)
    shard.close()
    path.write_bytes(path.read_bytes() + bytes(500))
    again = LiveShard(tmp_path, 0)
    assert again.version("v0").text("a") == "one"
    again.close()


def test_a_record_damaged_anywhere_is_refused_and_nothing_is_cut_off(tmp_path: Path) -> None:
    shard = LiveShard(make_root(tmp_path, []), 0)
    for i in range(3):
        shard.put([f"d{i}"], ["some text"], vector(i)[None])
    path = shard.journal._path(0)
    shard.close()
    content, head = path.read_bytes(), path.read_bytes().index(b"\n") + 1
    for at in range(0, len(content), 3):
        harmed = bytearray(content)
        harmed[at] ^= 0x41
        path.write_bytes(harmed)
        with pytest.raises(UserError, match=r"damaged|holds changes of") as told:
            LiveShard(tmp_path, 0)
        assert "\n" not in str(told.value)
        assert path.read_bytes() == harmed
    assert head < len(content)
    path.write_bytes(content)
    LiveShard(tmp_path, 0).close()


def test_many_writers_share_a_flush_and_the_last_one_of_an_id_in_the_journal_wins(tmp_path: Path) -> None:
    shard = LiveShard(make_root(tmp_path, []), 0)
    began = threading.Barrier(16)

    def writer(w: int) -> None:
        began.wait()
        for i in range(20):
            shard.put([f"w{w}-{i}", "shared"], [f"text {w} {i}", f"{w} {i}"], np.stack([vector(i), vector(w)]))

    threads = [threading.Thread(target=writer, args=(w,)) for w in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live = shard.version("v0")
    before = live.text("shared"), [live.text(f"w{w}-{i}") for w in range(16) for i in range(20)]
    assert shard.journal.flushes < 320, "some flushes were shared"
    assert len(live.view) == 321
    shard.close()
    again = LiveShard(tmp_path, 0)
    live = again.version("v0")
    assert (live.text("shared"), [live.text(f"w{w}-{i}") for w in range(16) for i in range(20)]) == before
    again.close()


def test_a_killed_writer_loses_nothing_that_it_had_acknowledged(tmp_path: Path) -> None:
    make_root(tmp_path, NAMES)
    program = f"""
import numpy as np, os, threading
from raysys.systems.rabtriever.live import LiveShard
shard = LiveShard({str(tmp_path)!r}, 0)
def writer(w):
    for i in range(100000):
        shard.put([f"w{{w}}-{{i}}"], ["x" * (i % 3000)], np.full((1, {D}), w + i, np.float32))
        os.write(1, f"w{{w}}-{{i}}\\n".encode())
for w in range(4): threading.Thread(target=writer, args=(w,)).start()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(50)]
    time.sleep(0.3)
    process.kill()
    acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    assert len(acknowledged) > 100
    shard = LiveShard(tmp_path, 0, wait_s=5)
    live = shard.version("v0")
    assert [id for id in acknowledged if live.text(id) is None] == []
    shard.close()


def test_a_shard_has_one_owner(tmp_path: Path) -> None:
    shard = LiveShard(make_root(tmp_path, []), 0)
    with pytest.raises(UserError, match="in use by another process; expected one owner"):
        LiveShard(tmp_path, 0, wait_s=0.2)
    threading.Timer(0.5, shard.close).start()
    LiveShard(tmp_path, 0, wait_s=10).close()


def test_a_write_that_fails_is_told_and_nothing_more_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import raysys.systems.rabtriever.journal as module

    shard = LiveShard(make_root(tmp_path, []), 0)
    shard.put(["a"], ["kept"], vector(1)[None])

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", full)
        with pytest.raises(OSError, match="No space"):
            shard.put(["b"], ["lost"], vector(2)[None])
    with pytest.raises(OSError, match="could not be written before"):
        shard.put(["c"], ["lost"], vector(2)[None])
    assert shard.journal.failed
    assert [shard.version("v0").text(id) for id in "abc"] == ["kept", None, None]
    shard.close()
    again = LiveShard(tmp_path, 0)
    assert [again.version("v0").text(id) for id in "abc"] == ["kept", None, None]
    again.close()


def test_a_search_never_misses_a_document_that_is_being_replaced(tmp_path: Path) -> None:
    shard, stop = LiveShard(make_root(tmp_path, NAMES), 0), threading.Event()
    best = 100 * np.ones((1, D), np.float32)
    shard.put(["top"], ["0"], best)

    def writer() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            shard.put(["top"], [str(i)], best)

    thread = threading.Thread(target=writer)
    thread.start()
    seen = [shard.version("v0").view.search(best, 2) for _ in range(400)]
    stop.set()
    thread.join()
    shard.close()
    assert all(found.ids[0][0] == "top" and found.ids[0][1] != "top" for found in seen)
    assert len({found.texts[0][0] for found in seen}) > 1


def test_changes_made_while_it_is_compacted_are_in_the_new_version_and_in_the_old(tmp_path: Path) -> None:
    shard, stop = LiveShard(make_root(tmp_path, NAMES, kind="hnsw"), 0), threading.Event()
    done: list[str] = []

    def writer() -> None:
        while not stop.is_set():
            shard.put([f"w{len(done)}"], ["text"], vector(len(done))[None])
            done.append(f"w{len(done)}")

    thread = threading.Thread(target=writer)
    thread.start()
    for i in range(1, 4):
        settle(shard.root, f"v{i}", f"v{i - 1}", [shard.compact(f"v{i}", f"v{i - 1}")])
        shard.version(f"v{i}")
    stop.set()
    thread.join()
    assert [id for id in done if shard.version("v3").text(id) is None] == []
    assert len(shard.version("v3").view) == len(NAMES) + len(done) == len(shard.version("v0").view)
    assert len(shard._open) == 2
    shard.close()


def test_a_version_built_anew_still_has_the_changes_and_one_whose_changes_are_gone_is_refused(tmp_path: Path) -> None:
    shard = LiveShard(make_root(tmp_path, NAMES[:2]), 0)
    shard.put(["new"], ["kept"], vector(1)[None])
    shard.delete(["d1"])
    shard.close()
    compact(tmp_path, "v1")
    builder = Builder(tmp_path, "v2", D, "model")
    builder.put(0, ["d0", "d1", "d2"], ["a", "b", "c"], np.stack([vector(i) for i in range(3)]))
    builder.finish()
    shard = LiveShard(tmp_path, 0)
    assert [shard.version("v2").text(id) for id in ("d0", "d1", "d2", "new")] == ["a", None, "c", "kept"]
    shard.close()
    (tmp_path / "journal" / "shard-000" / "changes-00000000.log").unlink()
    shard = LiveShard(tmp_path, 0)  # v1 holds what was in it
    assert shard.version("v1").text("new") == "kept"
    with pytest.raises(UserError, match="expected all from 0 on"):
        shard.version("v2")
    builder = Builder(tmp_path, "v3", D, "model")
    builder.put(0, ["d1"], ["b"], vector(1)[None])
    builder.finish()  # after the segment was deleted: its changes are given up
    assert [shard.version("v3").text(id) for id in ("d1", "new")] == ["b", None]
    shard.close()


def test_a_version_published_while_another_is_compacted_stays(tmp_path: Path) -> None:
    shard = LiveShard(make_root(tmp_path, NAMES), 0)
    builder = Builder(tmp_path, "v1", D, "model")
    builder.put(0, ["d1"], ["b"], vector(1)[None])
    builder.finish()
    size = shard.compact("v2", "v0")
    publish(tmp_path, "v1")
    with pytest.raises(UserError, match="v1 was published while v2 was made of v0; v1 stays"):
        settle(shard.root, "v2", "v0", [size])
    assert shard.root.current() == "v1"
    shard.close()


def test_a_copy_of_the_root_is_a_backup(tmp_path: Path) -> None:
    make_root(tmp_path / "a", NAMES, shards=2)
    shard = LiveShard(tmp_path / "a", Root.open(tmp_path / "a").shards - 1)
    shard.put(["x"], ["y"], vector(3)[None])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shard.delete(["x"])
    other = LiveShard(tmp_path / "b", 1)
    assert (other.version("v0").text("x"), shard.version("v0").text("x")) == ("y", None)
    for one in (shard, other):
        one.close()
    with pytest.raises(UserError, match="shard: got 2"):
        LiveShard(tmp_path / "b", 2)


@pytest.mark.parametrize("step", ["the new file", "its descriptor"])
def test_a_segment_that_cannot_be_started_fails_the_journal_and_no_other_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    import raysys.systems.rabtriever.journal as module

    shard = LiveShard(make_root(tmp_path, NAMES), 0)
    shard.put(["a"], ["kept"], vector(1)[None])
    with monkeypatch.context() as patched:

        def full(*args: object) -> int:
            raise OSError(28, "No space left on device")

        if step == "the new file":
            patched.setattr(module.Storage, "write_bytes", full)
        else:
            opened = module.os.open
            patched.setattr(
                module.os, "open", lambda path, *a: full() if str(path).endswith("1.log") else opened(path, *a)
            )
        with pytest.raises(OSError, match="No space"):
            shard.compact("v1", "v0")
    with (tmp_path / "foreign").open("wb"):  # gets the lowest number that is free
        for change in (lambda: shard.put(["b"], ["lost"], vector(2)[None]), shard.journal.rotate):
            with pytest.raises(OSError, match="could not be written before"):
                change()
    assert (tmp_path / "foreign").stat().st_size == 0
    assert shard.journal.failed
    shard.close()
    again = LiveShard(tmp_path, 0)
    assert [again.version("v0").text(id) for id in "ab"] == ["kept", None]
    again.put(["b"], ["kept too"], vector(2)[None])
    again.close()
    again = LiveShard(tmp_path, 0)
    assert [again.version("v0").text(id) for id in "ab"] == ["kept", "kept too"]
    again.close()


def test_a_version_that_is_closed_just_before_it_is_compacted_loses_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = LiveShard(make_root(tmp_path, NAMES), 0)
    for i in (1, 2):
        settle(shard.root, f"v{i}", f"v{i - 1}", [shard.compact(f"v{i}", f"v{i - 1}")])
    asked, version = [], shard.version

    def interrupted(name: str) -> object:
        live = version(name)
        asked.append(name)
        if len(asked) == 1:
            for other in ("v0", "v1"):
                version(other)
            shard.put(["new"], ["acknowledged"], vector(1)[None])
        return live

    monkeypatch.setattr(shard, "version", interrupted)
    settle(shard.root, "v3", "v2", [shard.compact("v3", "v2")])
    assert shard.version("v3").text("new") == "acknowledged"
    shard.close()
