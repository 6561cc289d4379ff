"""Backbones, the Feature Pyramid Decoder, its head, and models on disk."""

from robustfpd.models.build import build, enhance, load
from robustfpd.models.fpd import FPD, FPDClassifier, FPDOutput, Plain
from robustfpd.models.published import load_published

__all__ = ["FPD", "FPDClassifier", "FPDOutput", "Plain", "build", "enhance", "load", "load_published"]
