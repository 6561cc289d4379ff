"""Two-phase training of an FPD, adversarial training after it, and both for its undefended baseline."""

from robustfpd.training.loop import train
from robustfpd.training.metrics import EpochMetrics, Observer, Progress, TrainResult
from robustfpd.training.run_folder import RunFolder

__all__ = ["EpochMetrics", "Observer", "Progress", "RunFolder", "TrainResult", "train"]
