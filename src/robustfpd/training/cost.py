"""What a training costs at most, in passes of images through the network."""

from __future__ import annotations

from robustfpd.attacks.cost import Passes, Victim, most
from robustfpd.config import AdversarialConfig, RunConfig, TaskConfig
from robustfpd.training.validation import PGD_STEPS


def stage_cost(run: RunConfig, task: TaskConfig, train: int, validation: int) -> Passes:
    """Passes of all epochs of a run's stage, where the gate is always open and nothing stops early.

    Args:
        run: what is trained; its `stage` says which stage.
        task: what the network is made for.
        train: images of an epoch.
        validation: images it is measured on after each.
    """
    defended = run.model.defence == "fpd"
    epochs, measured = run.procedure.epochs, Passes(validation, 0)
    if run.stage == "two-phase":
        second = _second(run, train) if defended else 0
        return (Passes(1, 1) * (train + second) + measured) * epochs
    settings, channels, (height, width) = run.adversarial, task.in_channels, task.image_size
    victim = Victim(settings.norm, task.num_classes, channels * height * width)
    if settings.select_by == "robust":
        attacked = most("pgd", victim, {"steps": PGD_STEPS}) + Passes(2, 0)
        measured += attacked * min(settings.select_images, validation)
    clean = min(settings.start_epoch, epochs)
    second = _second(run, train) if defended and settings.second_pass else 0
    attacked_epoch = _attacked(settings, victim, train, second)
    return Passes(1, 1) * train * clean + attacked_epoch * (epochs - clean) + measured * epochs


def _second(run: RunConfig, train: int) -> int:
    """Images of an epoch that go through once more; of those in `shared` half a pass is told too much."""
    batch, every = run.procedure.batch_size, run.training.second_pass_interval
    return min(train, -(-train // (batch * every)) * batch)


def _attacked(settings: AdversarialConfig, victim: Victim, train: int, second: int) -> Passes:
    """An epoch with adversarial images: their making, the step, and what was restored once more."""
    options = {} if settings.attack == "fgsm" else {"steps": settings.steps}
    making = most(settings.attack, victim, options) + Passes(1 if settings.labels == "predicted" else 0, 0)
    halves = settings.batch == "halves"
    batches = -(-train // settings.batch_size)
    made = (train + batches) // 2 if halves else train  # of a batch of odd size the larger half
    return making * made + Passes(1, 1) * ((1 if halves else 2) * train + second)
