"""Data sets, training noise and augmentation."""

from robustfpd.data.datasets import Counts, Splits, count, info, load, names
from robustfpd.data.described import DatasetInfo
from robustfpd.data.image_set import ImageSet

__all__ = ["Counts", "DatasetInfo", "ImageSet", "Splits", "count", "info", "load", "names"]
