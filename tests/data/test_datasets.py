import gzip
import struct

import numpy as np
import pytest

from raysys.data import load_dataset
from raysys.data.datasets import IDX, DataError


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 10)):
        (tmp_path / IDX[part + "_x"]).write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        with gzip.open(tmp_path / (IDX[part + "_y"] + ".gz"), "wb") as file:
            file.write(idx(np.arange(n) % 10))
    return tmp_path


@pytest.fixture
def cifar_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        record = rng.integers(0, 256, (7, 3073), dtype=np.uint8)
        record[:, 0] %= 10
        (tmp_path / name).write_bytes(record.tobytes())
    return tmp_path


def test_digits_and_breast_cancer_ship_with_fixed_disjoint_splits():
    digits = load_dataset("digits")
    assert digits.features == (1, 8, 8)
    assert digits.classes == 10
    assert len(digits.train) + len(digits.test) == 1797
    assert 0 <= digits.train.x.min() <= digits.train.x.max() <= 1
    assert np.array_equal(digits.test.x, load_dataset("digits").test.x)
    cancer = load_dataset("breast_cancer")
    np.testing.assert_allclose(cancer.train.x.mean(0), 0, atol=1e-5)
    assert cancer.classes == 2


def test_idx_files_are_read_plain_or_gzipped(mnist_folder):
    data = load_dataset(str(mnist_folder))
    assert data.features == (1, 28, 28)
    assert (len(data.train), len(data.test), data.classes) == (40, 10, 10)


def test_cifar_binary_records_keep_channel_order(cifar_folder):
    data = load_dataset(str(cifar_folder))
    raw = np.frombuffer((cifar_folder / "data_batch_1.bin").read_bytes(), np.uint8)
    assert data.features == (3, 32, 32)
    assert data.train.x[0, 2, 5, 7] == np.float32(raw[1 + 2 * 1024 + 5 * 32 + 7]) / np.float32(255)
    assert data.train.y[1] == raw[3073]


def test_csv_table_with_groups(tmp_path):
    file = tmp_path / "heart.csv"
    lines = [f"{i},{i % 3},{'sick' if i % 2 else 'well'},{'ABC'[i % 3]}" for i in range(30)]
    file.write_text("age,chol,label,group\n" + "\n".join(lines))
    data = load_dataset(str(file))
    assert data.groups == ("A", "B", "C")
    assert data.features == (2,)
    assert data.classes == 2


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "announces shape"),
        (lambda b: b + b"x", "announces shape"),
        (lambda b: b"PK" + b[2:], "not an IDX file"),
        (lambda b: b[:3], "not an IDX file"),
        (lambda b: b"", "not an IDX file"),
    ],
)
def test_damaged_idx_file_is_refused(mnist_folder, change, message):
    damage(mnist_folder, IDX["train_x"], change)
    with pytest.raises(DataError, match=message):
        load_dataset(str(mnist_folder))


def test_truncated_gzip_is_refused(mnist_folder):
    damage(mnist_folder, IDX["train_y"] + ".gz", lambda b: b[:-4])
    with pytest.raises(DataError, match="cannot be decompressed"):
        load_dataset(str(mnist_folder))


def test_missing_idx_file_is_named(mnist_folder):
    (mnist_folder / IDX["test_x"]).unlink()
    with pytest.raises(DataError, match="lacks t10k-images"):
        load_dataset(str(mnist_folder))


def test_labels_and_images_must_agree(mnist_folder):
    (mnist_folder / (IDX["train_y"] + ".gz")).write_bytes(gzip.compress(idx(np.zeros(39))))
    with pytest.raises(DataError, match="40 train images but 39 labels"):
        load_dataset(str(mnist_folder))


def test_damaged_cifar_is_refused(cifar_folder):
    damage(cifar_folder, "data_batch_3.bin", lambda b: b[:-5])
    with pytest.raises(DataError, match="not a multiple of CIFAR-10's 3073"):
        load_dataset(str(cifar_folder))


def test_pickled_cifar_is_never_opened(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="pickle"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs a header with a 'label' column"),
        ("a,label\n" + "1,x\n" * 12 + "oops,y\n", "'oops' is not a number"),
        ("a,label\n" + "1,x\n" * 12 + "1\n", "line 14 has 1 fields"),
        ("a,label\n" + "nan,x\n" * 6 + "1,y\n" * 6, "NaN or infinite"),
        ("label\n" + "x\n" * 12, "no feature columns"),
        ("a,label\n" + "1,x\n" * 12, "one label only"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(str(file))


def test_binary_csv_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes(b"\xff\xfe\x00label")
    with pytest.raises(DataError, match="UTF-8"):
        load_dataset(str(file))


@pytest.mark.parametrize("source", ["", "no/such/folder", "mnist"])
def test_unknown_source_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data: "):
        load_dataset(source)
