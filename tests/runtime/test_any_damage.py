"""Properties: whatever is cut off or flipped, a log keeps whole lines and a checkpoint is its own bits or refused."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.runtime.checkpoint import CheckpointError, Checkpoints, read_state, write_state
from raysys.runtime.storage import Log, Storage

LINES = st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")).filter(bool), min_size=1, max_size=8)


def memory() -> Storage:
    return Storage(f"mock://{secrets.token_hex(6)}/run")


@given(lines=LINES, data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_log_cut_anywhere_is_a_prefix_of_its_lines(lines: list[bytes], data: st.DataObject) -> None:
    storage = memory()
    content = b"".join(line + b"\n" for line in lines)
    kept = data.draw(st.integers(0, len(content)))
    storage.write_bytes("log", content[:kept])
    log = Log(storage, "log")
    found = content[:kept].count(b"\n")
    log.append(b"after")
    log.flush()
    assert storage.read_bytes("log") == b"".join(line + b"\n" for line in [*lines[:found], b"after"])


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_one_changed_bit_or_cut_anywhere_in_a_checkpoint_is_noticed(data: st.DataObject) -> None:
    storage, reasons = memory(), list[str]()
    checkpoints = Checkpoints(storage, "c", "run/stage", refused=lambda name, reason: reasons.append(reason))
    file = f"{checkpoints.folder(7)}/host0.safetensors"
    digest = write_state(storage, file, {"x": np.arange(20.0)}, {"round": 7})
    checkpoints.commit(7, {file: digest})
    name = data.draw(st.sampled_from([file, f"{checkpoints.folder(7)}/manifest.json"]))
    content = bytearray(storage.read_bytes(name))
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[where] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[where:]
    storage.write_bytes(name, bytes(content))
    assert checkpoints.latest() is None
    assert len(reasons) == 1
    if name == file:
        with pytest.raises(CheckpointError):
            read_state(storage, file, digest)


@given(content=st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_a_state_file_or_refused(content: bytes) -> None:
    storage = memory()
    storage.write_bytes("state", content)
    with pytest.raises(CheckpointError):
        read_state(storage, "state")


@given(name=st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_no_name_leaves_its_folder(name: str) -> None:
    storage = Storage("/somewhere/run")
    try:
        address = storage.address(name)
    except ValueError:
        return
    assert Path(address).resolve().is_relative_to(Path("/somewhere/run").resolve())
