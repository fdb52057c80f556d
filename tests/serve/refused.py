"""Requests to the unified model that must be refused, with status and a part of the sentence."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Any

from made import b64, png64, wav_bytes


def bomb(width: int, height: int) -> str:
    """A PNG whose header announces more than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * 1000)
    return b64(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


def hostile(most: int) -> list[tuple[str, bytes, int, str]]:
    """Name, body, status, a part of the sentence."""
    good = {"input": [{"text": "a"}], "max_tokens": 2}
    inf, nan = float("inf"), float("nan")
    asks: list[tuple[Any, int, str]] = []
    asks += [
        ({**good, "temperature": t}, 422, "temperature: ")
        for t in (nan, inf, -inf, -1, 4.1, 1e308, "1", None, [], {}, True)
    ]
    asks += [({**good, "seed": s}, 422, "seed: ") for s in (-1, 2**63, 10**400, 1.5, "1", [], True, nan)]
    asks += [
        ({**good, "max_tokens": n}, 422, "max_tokens: ") for n in (0, -1, most + 1, 10**30, 1.5, "7", [], True, inf)
    ]
    asks += [
        ({**good, "budget": b}, 422, "budget: ")
        for b in ("tiny", "", "FULL", "full ", "../full", 1, [], {}, "x" * 65, "\x00")
    ]
    asks += [({**good, "latency_ms": x}, 422, "latency_ms: ") for x in (0, -1, nan, inf, "5", 1e-9, [], True)]
    asks += [({**good, "budget": "full", "latency_ms": 5.0}, 422, "beside a budget")]
    asks += [
        ({**good, "guidance": g, "output": "image", "max_tokens": None}, 422, "guidance: ")
        for g in (nan, -1, 21, "1", [])
    ]
    asks += [({**good, "guidance": 1.0}, 422, "guidance: is of images")]
    asks += [({**good, "output": o}, 422, "output: ") for o in ("speech", "", None, 1, ["text"], "TEXT")]
    asks += [({"input": [], "output": "video", "frames": n}, 422, "frames: ") for n in (0, 7, -1, 10**20, "2", 1.5)]
    asks += [({"input": [], "output": "audio", "frames": n}, 422, "frames: ") for n in (41, 10**9)]
    asks += [
        ({**good, "frames": 2}, 422, "frames: is of videos"),
        ({**good, "output": "image"}, 422, "max_tokens: is of texts"),
    ]
    asks += [({**good, name: 1}, 422, name) for name in ("speaker", "voice", "Temperature", "__class__", "sub")]
    asks += [({**good, "stream": s}, 422, "stream: ") for s in (1, "yes", None)]
    asks += [
        ({"input": i, "output": "text"}, 422, "input")
        for i in ("a", {}, None, 1, [1], ["a"], [[]], [None], [{}], [{"text": "a"}] * 33)
    ]
    asks += [({"input": [{"text": "a"}, {"audio": b64(wav_bytes())}], "continue_text": True}, 422, "continue_text: ")]
    texts = ("", None, 1, [], {"text": "a"}, "x" * 2001, "\ud800")
    asks += [({"input": [{"text": t}]}, 422, "input") for t in texts]
    asks += [({"input": [{"text": "zq " * 660}], "max_tokens": 10}, 422, "a row has 1000")]
    asks += [
        ({"input": [{"text": "a", "image": png64()}]}, 422, "exactly one of"),
        ({"input": [{"speaker": "x"}]}, 422, "input.0"),
    ]
    cut = base64.b64decode(png64(64, 64))
    images: list[tuple[Any, int, str]] = [
        ("", 422, "image"),
        ("not base64!", 422, "is not base64"),
        ("A", 422, "is not base64"),
        ("AAAA", 422, "not a whole PNG"),
        ("ß" * 8, 422, "is not base64"),
        (b64(cut[:-200]), 422, "not a whole PNG"),
        (b64(cut[:30]), 422, "not a whole PNG"),
        (b64(b"\x89PNG\r\n\x1a\n"), 422, "not a whole PNG"),
        (b64(b"GIF89a" + cut), 422, "not a whole PNG"),
        (png64(kind="GIF"), 422, "not a whole PNG"),
        (png64(mode="RGB", kind="BMP"), 422, "not a whole PNG"),
        (b64(b"<svg/>"), 422, "not a whole PNG"),
        (b64(wav_bytes()), 422, "not a whole PNG"),
        (bomb(60_000, 60_000), 422, "pixels"),
        (bomb(2**31 - 1, 2**31 - 1), 422, ""),
        (bomb(0, 5), 422, ""),
        (bomb(500, 500), 422, "pixels"),
        (bomb(300, 300), 422, "not a whole PNG"),
        ("A" * 90_000, 413, "at most 65536 bytes"),
        (1, 422, "input.0.image"),
        ([png64()], 422, "input.0.image"),
        (None, 422, "exactly one of"),
    ]
    asks += [({"input": [{"image": image}]}, status, part) for image, status, part in images]
    videos: tuple[Any, ...] = ([], "x", [1], [png64(), "AAAA"], [png64()] * 9, [png64()] * 5, [png64()] * 65, {})
    asks += [({"input": [{"video": video}]}, 422, "") for video in videos]
    asks += [
        (
            {"input": [{"image": png64()}] * 3, "output": "video", "frames": 3},
            422,
            "expected more frames than are given",
        )
    ]
    sounds: list[tuple[Any, str]] = [
        ("AAAA", "not a whole PCM WAV"),
        (b64(wav_bytes()[:-10]), "bytes of sound but holds"),
        (b64(wav_bytes()[:20]), "not a whole PCM WAV"),
        (b64(wav_bytes(declared=10**9)), "announces"),
        (b64(wav_bytes(rate=12_345)), "samples per second"),
        (b64(wav_bytes(rate=0)), "samples per second"),
        (b64(wav_bytes(rate=2**32 // 2 - 1)), "samples per second"),
        (b64(wav_bytes(samples=513)), "expected at most"),
        (b64(wav_bytes(samples=1100, rate=8000)), "expected at most"),
        (b64(wav_bytes(channels=9)), "channels"),
        (b64(wav_bytes(samples=0)), "announces"),
        (png64(), "not a whole PCM WAV"),
        (7, "audio"),
        (b64(b"RIFF" + b"\xff" * 60), "not a whole PCM WAV"),
    ]
    asks += [({"input": [{"audio": sound}]}, 422, part) for sound, part in sounds]
    asks += [(one, 422, "") for one in ([], "text", 3, None, [[]] * 50)]
    bodies = [(json.dumps(ask), status, part) for ask, status, part in asks]
    bodies += [
        ("[" * 100_000, 422, ""),
        ('{"input":' * 3000, 422, ""),
        ('{"seed": ' + "9" * 5000 + "}", 422, ""),
        ("", 422, ""),
        ("{", 422, "JSON"),
        ("\x00", 422, ""),
        ('{"input": [{"text": "a"}]} x', 422, "JSON"),
    ]
    every = [(f"{status} {part} {i}", body.encode(), status, part) for i, (body, status, part) in enumerate(bodies)]
    return [*every, ("not utf-8", b"\xff\xfe{", 422, ""), ("too large", b" " * 600_000, 413, "at most 524288")]
