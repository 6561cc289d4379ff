"""Data sets, training noise and augmentation."""

from robustfpd.data.datasets import DatasetInfo, ImageSet, Splits, info, load, names

__all__ = ["DatasetInfo", "ImageSet", "Splits", "info", "load", "names"]
