"""Data sets, training noise and augmentation."""

from robustfpd.data.datasets import Splits, info, load, names
from robustfpd.data.described import DatasetInfo
from robustfpd.data.images import ImageSet

__all__ = ["DatasetInfo", "ImageSet", "Splits", "info", "load", "names"]
