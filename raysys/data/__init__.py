"""Loaders of real data and the ways of dividing it among nodes."""

from raysys.data.datasets import Dataset, Split, load_dataset
from raysys.data.partition import Partition, make_partition

__all__ = ["Dataset", "Partition", "Split", "load_dataset", "make_partition"]
