"""Loaders of real data and the ways of dividing it among nodes."""

from raysys.data.datasets import Dataset, Split, load_dataset
from raysys.data.partition import Partition, make_partition
from raysys.data.texts import TextDataset, Texts, load_texts

__all__ = [
    "Dataset",
    "Partition",
    "Split",
    "TextDataset",
    "Texts",
    "load_dataset",
    "load_texts",
    "make_partition",
]
