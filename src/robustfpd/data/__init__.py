"""Data sets, training noise and augmentation."""

from robustfpd.data.datasets import Counts, Splits, count, info, load, names
from robustfpd.data.image_set import DatasetInfo, ImageSet

__all__ = ["Counts", "DatasetInfo", "ImageSet", "Splits", "count", "info", "load", "names"]
