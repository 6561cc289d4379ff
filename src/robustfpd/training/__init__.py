"""Two-phase training of an FPD, adversarial training after it, and both for its plain twin."""

from robustfpd.training.loop import train
from robustfpd.training.progress import EpochMetrics, Observer, Progress, TrainResult
from robustfpd.training.run_folder import RunFolder

__all__ = ["EpochMetrics", "Observer", "Progress", "RunFolder", "TrainResult", "train"]
