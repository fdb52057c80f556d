"""Checkpoints: bits in, bits out; what was damaged is refused with a reason, and the one before is used."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.runtime.checkpoint import Checkpoint, CheckpointError, Checkpoints, read_state, write_state
from raysys.runtime.storage import Storage


@pytest.fixture(params=["local", "mock"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path) if request.param == "local" else Storage(f"mock://{secrets.token_hex(4)}/run")


def commit(checkpoints: Checkpoints, round: int, value: float | None = None) -> None:
    name = f"{checkpoints.folder(round)}/host0.safetensors"
    state = {"x": torch.full((50,), float(round if value is None else value))}
    checkpoints.commit(round, {name: write_state(checkpoints.storage, name, state)}, {"round": round})


def refusals(storage: Storage) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    return Checkpoints(storage, "c", "run/stage", refused=lambda name, reason: said.append(reason)), said


def test_every_dtype_and_shape_comes_back_bit_for_bit(storage: Storage) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors: dict[str, Any] = {
        "float32": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "int64": torch.tensor(2**60),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 7),
        "view": base[1:, ::2],
        "alias": base,
        "float64 array": np.array([[np.pi, np.nan]]),
        "uint64 array": np.array(2**63, dtype=np.uint64),
        "Fortran array": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    meta = {"numbers": [1, 2.5, None], "nested": {"text": "é"}}
    digest = write_state(storage, "a/state", tensors, meta)
    back, meta_back = read_state(storage, "a/state", digest)
    assert meta_back == meta
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert type(back[key]) is type(value)
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        as_bytes = [
            np.ascontiguousarray(torch.as_tensor(v).contiguous().view(-1).view(torch.uint8)) for v in (back[key], value)
        ]
        assert np.array_equal(*as_bytes)


def test_the_newest_committed_checkpoint_is_found(storage: Storage) -> None:
    checkpoints, said = refusals(storage)
    assert checkpoints.latest() is None
    for round in (10, 9, 100):
        commit(checkpoints, round)
    name = f"{checkpoints.folder(100)}/host0.safetensors"
    found = checkpoints.latest()
    assert isinstance(found, Checkpoint)
    assert (found.round, found.meta, list(found.files)) == (100, {"round": 100}, [name])
    assert said == []


def test_two_are_kept(storage: Storage) -> None:
    checkpoints, _ = refusals(storage)
    for round in range(5):
        commit(checkpoints, round)
    assert storage.folders("c") == [checkpoints.folder(3), checkpoints.folder(4)]


def test_files_without_a_manifest_are_no_checkpoint(storage: Storage) -> None:
    checkpoints, said = refusals(storage)
    commit(checkpoints, 1)
    write_state(storage, f"{checkpoints.folder(2)}/host0.safetensors", {"x": torch.ones(2)})
    assert checkpoints.latest() is not None
    assert checkpoints.latest().round == 1  # type: ignore[union-attr]
    assert said == []


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    middle = len(data) - 20
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "cut short": _truncate,
    "one bit flipped": _flip,
    "empty": lambda data: b"",
    "foreign": lambda data: b"PK\x03\x04 not ours",
    "a pickle": lambda data: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "longer": lambda data: data + b"\0",
    "gone": None,
}


@pytest.mark.parametrize("which", ["manifest.json", "host0.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_a_reason_and_the_one_before_is_used(
    storage: Storage, which: str, damage: str
) -> None:
    checkpoints, said = refusals(storage)
    commit(checkpoints, 1)
    commit(checkpoints, 2)
    name, change = f"{checkpoints.folder(2)}/{which}", DAMAGES[damage]
    if change is None:
        storage.delete(name)
    else:
        storage.write_bytes(name, change(storage.read_bytes(name)))
    found = checkpoints.latest()
    assert found is not None
    assert found.round == 1
    if (which, damage) == ("manifest.json", "gone"):
        assert said == []  # without its manifest it never was one
    else:
        (reason,) = said
        assert name in reason


def test_a_changed_manifest_is_refused_even_if_it_is_valid_json(storage: Storage) -> None:
    checkpoints, said = refusals(storage)
    commit(checkpoints, 3)
    name = f"{checkpoints.folder(3)}/manifest.json"
    manifest = json.loads(storage.read_bytes(name))
    storage.write_bytes(name, json.dumps({**manifest, "meta": {"round": 4}}).encode())
    assert checkpoints.latest() is None
    assert "has changed since it was written" in said[0]


def test_the_checkpoint_of_another_run_is_refused(storage: Storage) -> None:
    commit(Checkpoints(storage, "c", "other run/stage"), 5)
    checkpoints, said = refusals(storage)
    assert checkpoints.latest() is None
    assert "belongs to 'other run/stage'" in said[0]


def test_a_checkpoint_moved_to_another_round_is_refused(storage: Storage) -> None:
    checkpoints, said = refusals(storage)
    commit(checkpoints, 5)
    storage.write_bytes(
        f"{checkpoints.folder(6)}/manifest.json", storage.read_bytes(f"{checkpoints.folder(5)}/manifest.json")
    )
    found = checkpoints.latest()
    assert found is not None
    assert found.round == 5
    assert "at round 5" in said[0]


def test_a_state_file_is_checked_without_a_digest_too(storage: Storage) -> None:
    for data in (b"", b"short", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"):
        storage.write_bytes("bad", data)
        with pytest.raises(CheckpointError, match="bad is not a whole state file"):
            read_state(storage, "bad")
    with pytest.raises(CheckpointError, match="absent cannot be read"):
        read_state(storage, "absent")


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/passwd", "c/elsewhere/x"])
def test_files_outside_the_checkpoint_cannot_be_committed(storage: Storage, name: str) -> None:
    with pytest.raises(ValueError, match=r"inside|must lie in"):
        Checkpoints(storage, "c").commit(1, {name: "0" * 64})


def test_a_round_that_is_committed_again_replaces_the_first(storage: Storage) -> None:
    checkpoints, _ = refusals(storage)
    commit(checkpoints, 4, 1.0)
    commit(checkpoints, 4, 2.0)
    found = checkpoints.latest()
    assert found is not None
    ((name, digest),) = found.files.items()
    assert read_state(storage, name, digest)[0]["x"][0] == 2.0


def test_metadata_with_integer_keys_and_tuples_still_verifies(storage: Storage) -> None:
    checkpoints, said = refusals(storage)
    checkpoints.commit(1, {}, {"delays": {10: 1, 9: 2}, "pair": (1, 2), "nan": float("nan")})
    assert checkpoints.latest() is not None, said
