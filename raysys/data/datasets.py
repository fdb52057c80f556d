"""Real data sets: those that ship with scikit-learn, published files in a folder, CSV tables, the Hugging Face hub.

Shapes: N examples, C classes; images are (N, channels, height, width) in [0, 1], tables are (N, features) standardised.

Notable choices
- The name says where the data comes from: `digits`, `breast_cancer`, a folder, a `.csv` file or `hf:owner/name`.
- A folder's format is recognised by its published file names: IDX files are MNIST or Fashion-MNIST, `data_batch_1.bin` is
  CIFAR-10's binary version. Its Python version is a pickle, and raysys never unpickles what it did not write itself.
- Every file is checked against its own header before use: a short, long or foreign file is refused with one sentence.
"""

from __future__ import annotations

import csv
import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class DataError(ValueError):
    """A data set that cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True)
class Split:
    """Examples `x` (N, ...) float32, labels `y` (N,) int64 and, where the source has one, the group of each example (N,)."""

    x: F32
    y: I64
    group: I64 | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """A train and a test split over the same `classes` labels; `groups` names the natural groups, if any."""

    name: str
    train: Split
    test: Split
    classes: int
    groups: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.x.shape[1:])


def load_dataset(source: str) -> Dataset:
    """The data set that `source` names.

    Args:
        source: `digits` (1,797 images 8x8, 10 classes) or `breast_cancer` (569 rows, 30 features, 2 classes), which ship
            with scikit-learn; a folder of MNIST, Fashion-MNIST or CIFAR-10 (binary) files; a CSV file with a `label` and
            optionally a `group` column; or `hf:owner/name` from the Hugging Face hub (extra `hub`).
    Raises:
        DataError: the source does not exist or is not in a known format; the message says what was found.
    """
    if source == "digits":
        return _digits()
    if source == "breast_cancer":
        return _breast_cancer()
    if source.startswith("hf:"):
        return _hub(source[3:])
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"data: got {source!r}, which is neither digits, breast_cancer, hf:owner/name nor an existing folder or file"
        )
    if path.is_file():
        if path.suffix != ".csv":
            raise DataError(f"data: got the file {source!r}; a single file must be a .csv table")
        return _csv(path)
    return _folder(path)


def _held_out(n: int, fraction: float = 0.2) -> NDArray[np.bool_]:
    """The fixed test rows of a data set that ships without a split: the same for every seed."""
    test = np.zeros(n, dtype=bool)
    test[np.random.Generator(np.random.Philox(key=20)).permutation(n)[: int(n * fraction)]] = True
    return test


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[:, None]
    y = bunch.target.astype(np.int64)
    test = _held_out(len(y))
    return Dataset("digits", Split(x[~test], y[~test]), Split(x[test], y[test]), 10)


def _breast_cancer() -> Dataset:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    return _table("breast_cancer", bunch.data, bunch.target.astype(np.int64), None, ())


def _table(name: str, x: NDArray[np.float64], y: I64, group: I64 | None, groups: tuple[str, ...]) -> Dataset:
    """Standardise by the training rows' mean and deviation and split off a fifth."""
    test = _held_out(len(y))
    scale = x[~test].std(0)
    z = ((x - x[~test].mean(0)) / np.where(scale > 0, scale, 1.0)).astype(np.float32)
    part = [Split(z[m], y[m], None if group is None else group[m]) for m in (~test, test)]
    return Dataset(name, part[0], part[1], int(y.max()) + 1, groups)


def _csv(path: Path) -> Dataset:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"data: {path} is not a UTF-8 CSV table ({e})") from e
    if len(rows) < 11 or "label" not in rows[0]:
        raise DataError(
            f"data: {path} needs a header with a 'label' column and at least 10 rows, got {len(rows)} lines"
        )
    header, body = rows[0], rows[1:]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise DataError(f"data: {path} line {number} has {len(row)} fields, the header has {len(header)}")
    column = {name: [row[i] for row in body] for i, name in enumerate(header)}
    labels = sorted(set(column["label"]))
    y = np.array([labels.index(v) for v in column["label"]], dtype=np.int64)
    groups = tuple(sorted(set(column["group"]))) if "group" in column else ()
    group = np.array([groups.index(v) for v in column["group"]], dtype=np.int64) if groups else None
    names = [name for name in header if name not in ("label", "group")]
    if not names:
        raise DataError(f"data: {path} has no feature columns besides 'label' and 'group'")
    x = np.empty((len(body), len(names)))
    for j, name in enumerate(names):
        for i, value in enumerate(column[name]):
            try:
                x[i, j] = float(value)
            except ValueError:
                raise DataError(f"data: {path} line {i + 2}, column {name!r}: {value!r} is not a number") from None
    if not np.isfinite(x).all():
        raise DataError(f"data: {path} holds NaN or infinite values; every feature must be a finite number")
    if len(labels) < 2:
        raise DataError(f"data: {path} has one label only, {labels[0]!r}; a classifier needs two or more")
    return _table(path.stem, x, y, group, groups)


IDX = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


def _folder(path: Path) -> Dataset:
    names = {p.name for p in path.iterdir()}
    if IDX["train_x"] in names or IDX["train_x"] + ".gz" in names:
        return _idx_dataset(path, names)
    if "data_batch_1.bin" in names:
        return _cifar10(path)
    if "data_batch_1" in names:
        raise DataError(
            f"data: {path} holds CIFAR-10's Python version, which is a pickle and never opened; use cifar-10-binary.tar.gz"
        )
    raise DataError(
        f"data: the folder {path} holds neither {IDX['train_x']}[.gz] (MNIST, Fashion-MNIST) nor data_batch_1.bin (CIFAR-10)"
    )


def _idx_dataset(path: Path, names: set[str]) -> Dataset:
    array = {}
    for key, name in IDX.items():
        found = name if name in names else f"{name}.gz"
        if found not in names:
            raise DataError(f"data: the folder {path} lacks {name}[.gz]")
        array[key] = _idx(path / found, dimensions=3 if key.endswith("x") else 1)
    splits = []
    for part in ("train", "test"):
        x, y = array[part + "_x"], array[part + "_y"]
        if len(x) != len(y):
            raise DataError(f"data: {path} has {len(x)} {part} images but {len(y)} labels")
        splits.append(Split((x[:, None] / np.float32(255)).astype(np.float32), y.astype(np.int64)))
    classes = int(max(splits[0].y.max(), splits[1].y.max())) + 1
    return Dataset(path.name, splits[0], splits[1], classes)


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as e:
        raise DataError(f"data: {path} cannot be decompressed ({e})") from e
    head = 4 + 4 * dimensions
    if len(raw) < head or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"data: {path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", raw[4:head])
    if len(raw) - head != int(np.prod(shape, dtype=np.int64)) or 0 in shape:
        raise DataError(f"data: {path} announces shape {shape} but holds {len(raw) - head} bytes of data")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _cifar10(path: Path) -> Dataset:
    def batch(name: str) -> Split:
        file = path / name
        if not file.exists():
            raise DataError(f"data: the folder {path} lacks {name}")
        raw = np.frombuffer(file.read_bytes(), np.uint8)
        if raw.size == 0 or raw.size % 3073:
            raise DataError(
                f"data: {file} holds {raw.size} bytes, which is not a multiple of CIFAR-10's 3073 per record"
            )
        record = raw.reshape(-1, 3073)
        if record[:, 0].max() > 9:
            raise DataError(f"data: {file} has a label {record[:, 0].max()}, CIFAR-10's run from 0 to 9")
        x = record[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / np.float32(255)
        return Split(x, record[:, 0].astype(np.int64))

    parts = [batch(f"data_batch_{i}.bin") for i in range(1, 6)]
    train = Split(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
    return Dataset("cifar10", train, batch("test_batch.bin"), 10)


def _hub(name: str) -> Dataset:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError(f"data: hf:{name} needs the package datasets; install raysys[hub]") from None
    try:
        found = datasets.load_dataset(name)
    except Exception as e:  # the hub client raises many unrelated types
        raise DataError(f"data: hf:{name} could not be loaded ({type(e).__name__}: {str(e).splitlines()[0]})") from e
    if not {"train", "test"} <= set(found):
        raise DataError(f"data: hf:{name} has the splits {sorted(found)}, train and test are needed")
    features = found["train"].features
    image = next((k for k, v in features.items() if isinstance(v, datasets.Image)), None)
    label = next((k for k, v in features.items() if isinstance(v, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise DataError(f"data: hf:{name} has the columns {sorted(features)}; an image and a class label are needed")

    def split(part: str) -> Split:
        x = np.stack([np.asarray(v, dtype=np.float32) / np.float32(255) for v in found[part][image]])
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        return Split(np.ascontiguousarray(x), np.asarray(found[part][label], dtype=np.int64))

    return Dataset(name, split("train"), split("test"), features[label].num_classes)
