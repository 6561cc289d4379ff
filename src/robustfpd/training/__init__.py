"""Two-phase training of an FPD and training of its plain twin."""

from robustfpd.training.loop import EpochMetrics, Observer, Progress, TrainResult, train
from robustfpd.training.run_folder import RunFolder

__all__ = ["EpochMetrics", "Observer", "Progress", "RunFolder", "TrainResult", "train"]
