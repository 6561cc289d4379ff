"""Backbones, the Feature Pyramid Decoder, its head, and models on disk."""

from robustfpd.models.build import build, enhance, load
from robustfpd.models.fpd import FPD, FPDClassifier, FPDOutput, Plain

__all__ = ["FPD", "FPDClassifier", "FPDOutput", "Plain", "build", "enhance", "load"]
