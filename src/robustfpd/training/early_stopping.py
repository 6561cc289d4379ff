"""Which epoch was the best, and when to stop waiting for a better one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """Follows validation accuracy. On small splits accuracies tie: the lower validation loss wins."""

    patience: int | None
    best: float = -1.0
    best_loss: float = float("inf")
    best_epoch: int = -1
    epoch: int = -1

    def better(self, epoch: int, accuracy: float, loss: float) -> bool:
        """Take note of an epoch; return whether it is the best so far."""
        self.epoch = epoch
        if (accuracy, -loss) <= (self.best, -self.best_loss):
            return False
        self.best, self.best_loss, self.best_epoch = accuracy, loss, epoch
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs have gone by without a better one."""
        return self.patience is not None and self.epoch - self.best_epoch >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return asdict(self)
