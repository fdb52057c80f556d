"""Embedded data and folders of text, images, frames and sound: what is held out, what is refused."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from raysys.data.datasets import DataError
from raysys.data.media import decode_picture, read_picture, read_sound
from raysys.data.multimodal import KIND, Form, load_multimodal
from raysys.data.multimodal_embedded import chosen, digits, pieces, unseen

DATA = load_multimodal()


def picture(path: Path, width: int = 16, height: int = 16, shade: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, 0, shade)).save(path)
    return path


def sound(path: Path, rate: int = 8000, count: int = 4096, channels: int = 1, depth: int = 2) -> Path:
    """A 200 Hz sine at half loudness in every channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = 0.5 * np.sin(2 * np.pi * 200 * np.arange(count) / rate)
    full = np.rint(value * 2.0 ** (8 * depth - 1)).astype(np.int64) + (128 if depth == 1 else 0)
    raw = np.repeat(full, channels).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :depth]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(depth)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())
    return path


@pytest.mark.parametrize("task", KIND)
def test_an_item_is_a_function_of_seed_and_index(task: str) -> None:
    again, other = load_multimodal(seed=0).train(task), load_multimodal(seed=1).train(task)
    here = DATA.train(task)
    for i in (0, 7, len(here) - 1):
        a, b = here[i], again[i]
        assert (a.task, a.text, a.facts) == (task, b.text, b.facts)
        for left, right in ((a.frames, b.frames), (a.wave, b.wave)):
            assert (left is None and right is None) or np.array_equal(left, right)
    assert [x.text for x in here[:20]] == [here[i].text for i in range(20)]
    if task != "lm":
        assert [x.text for x in here[:40]] != [x.text for x in other[:40]]


def test_held_out_digits_are_those_with_index_divisible_by_five() -> None:
    train, test = chosen(False), chosen(True)
    assert (test % 5 == 0).all()
    assert (train % 5 != 0).all()
    assert len(train) + len(test) == 1797
    seen = {digits()[0][i].tobytes() for i in train}
    pixels = [x.frames[0, 0] for x in DATA.test("t2i")]
    corners = {
        c[r : r + 8, s : s + 8].tobytes()
        for c in pixels
        for r in (0, 8)
        for s in (0, 8)
        if c[r : r + 8, s : s + 8].any()
    }
    assert len(corners) == len(test)
    assert not corners & seen


def test_captions_say_what_is_shown() -> None:
    where = {"top left": (0, 0), "top right": (0, 8), "bottom left": (8, 0), "bottom right": (8, 8)}
    counts = dict.fromkeys(where, 0)
    for item in DATA.train("i2t")[:200]:
        r, s = where[item.facts["place"]]
        counts[item.facts["place"]] += 1
        assert item.frames is not None
        inside = item.frames[0, 0, r : r + 8, s : s + 8].sum()
        assert inside == item.frames.sum() > 0
        assert item.text.endswith(f"at the {item.facts['place']}")
    assert min(counts.values()) > 25  # 50 expected, standard deviation 6


@pytest.mark.parametrize("form", [Form(), Form(frames=6, height=24, width=20, channels=3)])
def test_digits_move_where_the_caption_says(form: Form) -> None:
    for item in load_multimodal(form=form).train("t2v")[:60]:
        clip = item.frames
        assert clip is not None
        assert clip.shape == (form.frames, form.channels, form.height, form.width)
        assert np.allclose(clip.sum((1, 2, 3)), clip.sum() / form.frames, rtol=1e-5)  # nothing is lost at a border
        rows, columns = np.arange(form.height)[:, None], np.arange(form.width)[None]
        y, x = ((clip * axis).sum((1, 2, 3)) / clip.sum((1, 2, 3)) for axis in (rows, columns))
        way = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[item.facts["direction"]]
        assert np.allclose(np.diff(y), np.diff(y)[0], atol=1e-3)
        assert np.allclose((np.sign(np.round(np.diff(y)[0], 3)), np.sign(np.round(np.diff(x)[0], 3))), way)


def test_tones_have_the_register_and_shape_of_their_caption() -> None:
    for item in DATA.test("a2t")[:60]:
        assert item.wave is not None
        halves = np.split(item.wave, 2)
        at = [np.abs(np.fft.rfft(h * np.hanning(1024))).argmax() * 4000 / 1024 for h in halves]
        assert (np.mean(at) < 600) == (item.facts["register"] == "low")
        bend = np.log2(at[1] / at[0])
        assert item.facts["shape"] == ("rising" if bend > 0.2 else "falling" if bend < -0.2 else "steady")
        assert np.abs(item.wave).max() < 1


def test_tones_are_drawn_anew_for_testing() -> None:
    a, b = DATA.train("t2a")[0].wave, DATA.test("t2a")[0].wave
    assert a is not None
    assert b is not None
    assert not np.array_equal(a, b)


def test_topics_are_held_out_whole() -> None:
    from pydoc_data.topics import topics

    held = "".join(topics[name] for name in sorted(topics)[::10])
    assert len("".join(x.text for x in DATA.train("lm"))) + len(held) == sum(map(len, topics.values()))
    assert all(item.text in held for item in DATA.test("lm"))


def test_held_out_text_shares_no_eight_words_with_training() -> None:
    """Topics quote each other: `else` is a part of `if`."""
    from pydoc_data.topics import topics

    known = " " + " ".join(" ".join(item.text.split()) for item in DATA.train("lm")) + " "
    for item in DATA.test("lm"):
        words = item.text.split()
        assert not any(f" {' '.join(words[i : i + 8])} " in known for i in range(len(words) - 7))
    whole = [piece for name in sorted(topics)[::10] for piece in pieces(topics[name], DATA.form.piece)]
    assert f"{len(whole) - len(DATA.test('lm'))} of {len(whole)} held-out pieces" in DATA.note
    assert len(DATA.test("lm")) > 0.7 * len(whole)
    assert unseen(["a b c d", "b c d e", "a b"], ["x a b c y", "d"], 3) == ["b c d e", "a b"]


@given(st.text(alphabet="ab \n", max_size=200), st.integers(16, 40))
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_text(text: str, most: int) -> None:
    parts = pieces(text, most)
    assert "".join(parts) == text
    assert all(1 <= len(p) <= most for p in parts)


def test_photos_are_crops_in_colour() -> None:
    data = load_multimodal("photos", form=Form(channels=3, height=32, width=32))
    assert data.tasks == ("t2i", "i2t")
    item = data.test("t2i")[3]
    assert item.frames is not None
    assert item.frames.shape == (1, 3, 32, 32)
    assert item.frames.std() > 0.02


def test_a_folder_of_everything(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", 20, 16, 40 * i).with_suffix(".txt").write_text(f"shade {i}")
        sound(tmp_path / "audio" / f"{i}.wav").with_suffix(".txt").write_text("a\nhum ")
        for t in range(9):
            picture(tmp_path / "video" / f"clip{i}" / f"{t:03d}.png", shade=t)
        (tmp_path / "video" / f"clip{i}.txt").write_text(f"clip {i}")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("word " * 2000)
    data = load_multimodal(str(tmp_path), form=Form(channels=3))
    assert data.tasks == ("lm", "t2i", "i2t", "t2v", "v2t", "t2a", "a2t")
    assert {x.text for x in data.test("i2t")} == {"shade 0", "shade 5"}
    assert {x.text for x in data.train("i2t")} == {"shade 1", "shade 2", "shade 3", "shade 4"}
    assert sorted(x.text for x in data.train("t2v")) == sorted(
        ["clip 1", "clip 2", "clip 3", "clip 4"] * 2
    )  # 9 // 4 windows
    assert {x.text for x in data.train("t2a")} == {"a hum"}
    assert len("".join(x.text for x in data.test("lm"))) == pytest.approx(1000, abs=300)
    item = next(x for x in data.train("i2t") if x.text == "shade 3")
    assert item.frames is not None
    assert np.allclose(item.frames[0, 0], 120 / 255)
    assert np.allclose(item.frames[0, 1], 0)


def test_folders_take_the_place_of_embedded_kinds(tmp_path: Path) -> None:
    for i in range(10):
        sound(tmp_path / f"{i}_nobody_{i}.wav")
    data = load_multimodal(f"embedded+{tmp_path}")
    assert len(data.tasks) == 7
    assert {x.facts["digit"] for x in data.test("a2t")} == set("01234")
    assert data.train("a2t")[0].text in ("five", "six", "seven", "eight", "nine")
    assert data.train("t2i")[0].facts["digit"]


def test_labels_may_carry_facts(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text('file,caption,digit\n0.png,"a, b",4\n1.png,c,5\n')
    data = load_multimodal(str(tmp_path))
    assert data.test("i2t")[0].facts == {"digit": "4"}
    assert data.test("i2t")[0].text == "a, b"


def test_all_captions_of_a_picture_are_in_one_split(tmp_path: Path) -> None:
    rows = ["file,caption"]
    for i in range(10):
        Image.fromarray(np.full((16, 16), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    rows += [f"{i}.png,caption {n}" for n in range(5) for i in reversed(range(10))]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    data = load_multimodal(str(tmp_path))
    shown = [{float(x.frames.mean()) for x in part} for part in (data.train("i2t"), data.test("i2t"))]
    assert [len(part) for part in shown] == [8, 2]
    assert not shown[0] & shown[1]
    assert sorted({round(255 * x) for x in shown[1]}) == [0, 100]  # 0.png and 5.png


@pytest.mark.parametrize("place", ["video/a", "images"])
def test_folders_that_are_links_out_are_refused(tmp_path: Path, place: str) -> None:
    for i in range(8):
        picture(tmp_path / "outside" / f"{i}.png")
        (tmp_path / "outside" / f"{i}.txt").write_text("x")
    (tmp_path / "outside" / "caption.txt").write_text("x")
    link = tmp_path / "data" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="leads out"):
        load_multimodal(str(tmp_path / "data"))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_of_every_depth_are_the_same_sound(tmp_path: Path, depth: int, channels: int) -> None:
    read = read_sound(sound(tmp_path / "x.wav", channels=channels, depth=depth), Form())
    expected = 0.5 * np.sin(2 * np.pi * 200 * np.arange(2048) / 4000)
    assert np.abs(read - expected)[100:-100].max() < (
        0.02 if depth == 1 else 0.008
    )  # resampling overshoots at the ends


def test_sounds_are_brought_to_one_loudness_but_silence_is_not_made_loud(tmp_path: Path) -> None:
    whole = sound(tmp_path / "x.wav").read_bytes()
    for factor in (1, 0.1, 0):
        quiet = (np.frombuffer(whole[44:], "<i2") * factor).astype("<i2").tobytes()
        (tmp_path / "x.wav").write_bytes(whole[:44] + quiet)
        peak = np.abs(read_sound(tmp_path / "x.wav", Form())).max()
        assert peak == pytest.approx(0.5 if factor else 0, abs=1e-6)


def test_short_sounds_end_in_silence_and_long_ones_are_cut(tmp_path: Path) -> None:
    for i in range(2):
        sound(tmp_path / f"{i}.wav", count=800 + 8000 * i).with_suffix(".txt").write_text("x")
    data = load_multimodal(str(tmp_path))
    short, long = data.test("t2a")[0].wave, data.train("t2a")[0].wave
    assert short is not None
    assert long is not None
    assert short[:300].std() > 0.3
    assert not short[450:].any()
    assert long[-300:].std() > 0.3
    assert "1 of 2 sounds are longer than 0.512 s" in data.note


def test_pictures_are_cut_around_their_middle(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    Image.fromarray(wide).save(tmp_path / "x.png")
    assert np.allclose(read_picture(tmp_path / "x.png", Form()), 1)


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG file that announces its size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not a whole"),
        (b"\x89PNG\r\n\x1a\n", "not a whole"),
        (b"GIF89a" + bytes(100), "not a whole"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a whole"),
        (png(100_000, 100_000), "pixels"),
        (png(12_000, 12_000), "pixels"),
        (png(2**31 - 1, 1), "pixels"),
        (png(0, 5), "not a whole|pixels"),
    ],
)
def test_hostile_pictures_are_refused_before_they_are_decoded(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    (tmp_path / "x.txt").write_text("a thing")
    with pytest.raises(DataError, match=told) as error:
        load_multimodal(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_picture_cut_short_is_refused_when_it_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for i in range(2):
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("noise")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    data = load_multimodal(str(tmp_path))
    with pytest.raises(DataError, match="not a whole PNG"):
        data.test("i2t")[0]


@given(st.integers(0, 400), st.binary(min_size=1, max_size=6))
@example(13, bytes(4))  # a chunk that is longer than the file
@settings(max_examples=150, deadline=None)
def test_a_damaged_picture_or_sound_is_read_or_refused(at: int, with_: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for file, read in (
            (picture(Path(folder) / "x.png"), read_picture),
            (sound(Path(folder) / "x.wav"), read_sound),
        ):
            raw = bytearray(file.read_bytes())
            raw[at % len(raw) : at % len(raw) + len(with_)] = with_
            file.write_bytes(bytes(raw))
            with suppress(DataError):
                assert np.isfinite(read(file, Form())).all()


def wav(
    rate: int = 8000, channels: int = 1, depth: int = 16, kind: int = 1, announced: int = 100, held: int = 100
) -> bytes:
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * depth // 8, channels * depth // 8, depth)
    data = b"fmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", announced) + bytes(held)
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WAVE" + data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not a whole"),
        (b"RIFF\x00\x00\x00\x00WAVE", "not a whole"),
        (wav(kind=3, depth=32), "not a whole"),
        (wav(channels=0), "not a whole|channels"),
        (wav(channels=9), "announces"),
        (wav(rate=0), "announces"),
        (wav(rate=4_000_000), "announces"),
        (wav(announced=10_000, held=100), "holds"),
        (wav(announced=0xFFFFFFF0, held=100), "announces"),
        (wav(announced=0, held=0), "announces"),
    ],
)
def test_hostile_sounds_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.wav").write_bytes(content)
    (tmp_path / "x.txt").write_text("a thing")
    with pytest.raises(DataError, match=told):
        load_multimodal(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("file,caption\n../secret.png,x\n", "inside"),
        ("file,caption\n/etc/passwd,x\n", "inside"),
        ("file,caption\na/../../secret.png,x\n", "inside"),
        ("file,caption\nmissing.png,x\n", "no such"),
        ("file,caption\nlabels.csv,x\n", "no such"),
        ("file,caption\nlink.png,x\n", "leads out"),
        ("file,caption\nok.png\n", "fields"),
        ("file,caption\nok.png,x,y\n", "fields"),
        ("file,caption\nok.png,\n", "0 characters"),
        ('file,caption\nok.png,"x\n', "CSV"),
        ("name,caption\nok.png,x\n", "columns"),
        ("file,caption\n", "no rows"),
        ("file,caption\nok.png,x\n", "one split"),
    ],
)
def test_labels_that_lead_astray_are_refused(tmp_path: Path, rows: str, told: str) -> None:
    picture(tmp_path / "secret.png")
    picture(tmp_path / "images" / "ok.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "labels.csv").write_text(rows)
    with pytest.raises(DataError, match=told):
        load_multimodal(str(tmp_path))


def test_other_mistakes_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.txt"):
        load_multimodal(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        load_multimodal(str(tmp_path))
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="too short"):
        load_multimodal(str(tmp_path))
    picture(tmp_path / "alone.png")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="no caption"):
        load_multimodal(str(tmp_path))
    for source in ("", "nowhere", "embedded+nowhere", "photos+x"):
        with pytest.raises(DataError, match="expected embedded"):
            load_multimodal(source)
    with pytest.raises(DataError, match="channels"):
        Form(channels=2)
    with pytest.raises(DataError, match="canvas"):
        load_multimodal(form=Form(height=8))
    with pytest.raises(DataError, match="has no audio"):
        load_multimodal("photos").train("t2a")
    with pytest.raises(DataError, match="task"):
        DATA.train("t2x")
    with pytest.raises(IndexError):
        DATA.train("lm")[10**9]


def test_spoken_digits_of_the_shared_folder(shared_data: Path) -> None:
    data = load_multimodal(str(shared_data / "fsdd"))
    assert (len(data.train("a2t")), len(data.test("a2t"))) == (1350, 150)
    assert {x.facts["speaker"] for x in data.test("a2t")[:60]} == {"nicolas", "theo", "yweweler"}
    assert "CC BY-SA" in data.licence


def test_shakespeare_of_the_shared_folder(shared_data: Path) -> None:
    data = load_multimodal(str(shared_data / "text"))
    train, test = ("".join(x.text for x in part("lm")) for part in (data.train, data.test))
    assert (train + test).encode() == (shared_data / "text" / "tinyshakespeare.txt").read_bytes()
    assert len(test) / len(train + test) == pytest.approx(0.1, abs=0.005)


def test_what_cannot_be_seen_is_black_and_deep_pictures_are_refused() -> None:
    made = io.BytesIO()
    clear = np.full((16, 16, 4), 255, np.uint8)
    clear[:8, :, 3] = 0
    Image.fromarray(clear).save(made, "PNG")
    found = decode_picture(made.getvalue(), "it", Form())
    assert found[0, :8].max() == 0
    assert found[0, 8:].min() == 1
    deep = io.BytesIO()
    Image.fromarray(np.full((16, 16), 20000, np.uint16)).save(deep, "PNG")
    with pytest.raises(DataError, match="8 bits"):
        decode_picture(deep.getvalue(), "it", Form())
