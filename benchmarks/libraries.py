"""Attacks of other libraries, called as documented, on images in [0, 1].

All run the same number of steps of the same size from one random start on cross-entropy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.config import Norm
from robustfpd.rng import generator

OURS = "robustfpd"


@dataclass(frozen=True)
class AttackCase:
    """A classifier, a batch and the parameters of an attack."""

    classifier: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    norm: Norm
    steps: int
    step_size: float
    """Of PGD; APGD adapts its own."""
    classes: int


Run = Callable[[], Tensor]
"""Runs a prepared attack and returns adversarial images."""
Prepare = Callable[[AttackCase], Run]


@dataclass(frozen=True)
class Library:
    """A library and its attacks by our names."""

    package: str
    """Import name."""
    version: str
    """Version that the calls were written for."""
    attacks: Mapping[str, Prepare]

    def missing(self, attack: str) -> str:
        """Return why the library cannot run the attack; empty where it can."""
        if attack not in self.attacks:
            return "has none"
        return "" if importlib.util.find_spec(self.package) is not None else "not installed"


def robustfpd_pgd(case: AttackCase) -> Run:
    """Our PGD without early stopping, as in the other libraries."""
    return lambda: attacks.get("pgd")(
        case.classifier, case.images, case.labels, eps=case.eps, norm=case.norm, steps=case.steps,
        step_size=case.step_size, early_stop=False, generator=generator(0, "benchmark"),
    )  # fmt: skip


def robustfpd_apgd(case: AttackCase) -> Run:
    """Our APGD, which stops at misclassified images."""
    return lambda: attacks.get("apgd-ce")(
        case.classifier, case.images, case.labels, eps=case.eps, norm=case.norm, steps=case.steps,
        generator=generator(0, "benchmark"),
    )  # fmt: skip


def torchattacks_pgd(case: AttackCase) -> Run:
    """`torchattacks.PGD` and `PGDL2`."""
    import torchattacks

    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[case.norm]
    attack = kind(case.classifier, eps=case.eps, alpha=case.step_size, steps=case.steps, random_start=True)
    return lambda: attack(case.images, case.labels)


def torchattacks_apgd(case: AttackCase) -> Run:
    """`torchattacks.APGD`."""
    import torchattacks

    norm = {"linf": "Linf", "l2": "L2"}[case.norm]
    attack = torchattacks.APGD(case.classifier, norm=norm, eps=case.eps, steps=case.steps, n_restarts=1, loss="ce")
    return lambda: attack(case.images, case.labels)


def foolbox_pgd(case: AttackCase) -> Run:
    """`foolbox.attacks.LinfPGD` and `L2PGD`."""
    import foolbox

    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[case.norm]
    model = foolbox.PyTorchModel(case.classifier, bounds=(0, 1), device=case.images.device)
    attack = kind(abs_stepsize=case.step_size, steps=case.steps, random_start=True)
    return lambda: attack.run(model, case.images, case.labels, epsilon=case.eps)


def art_pgd(case: AttackCase) -> Run:
    """`ProjectedGradientDescentPyTorch`, which takes and returns NumPy arrays."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    attack = ProjectedGradientDescentPyTorch(
        _art_estimator(case), norm=_art_norm(case), eps=case.eps, eps_step=case.step_size, max_iter=case.steps,
        num_random_init=1, batch_size=len(case.images), verbose=False,
    )  # fmt: skip
    return lambda: _art_run(attack, case)


def art_apgd(case: AttackCase) -> Run:
    """`AutoProjectedGradientDescent`, with a first step of twice eps as in AutoAttack."""
    from art.attacks.evasion import AutoProjectedGradientDescent

    attack = AutoProjectedGradientDescent(
        _art_estimator(case), norm=_art_norm(case), eps=case.eps, eps_step=2 * case.eps, max_iter=case.steps,
        nb_random_init=1, batch_size=len(case.images), loss_type="cross_entropy", verbose=False,
    )  # fmt: skip
    return lambda: _art_run(attack, case)


def pyautoattack_apgd(case: AttackCase) -> Run:
    """`APGDAttack`, AutoAttack's own."""
    from pyautoattack.autopgd_base import APGDAttack

    norm = {"linf": "Linf", "l2": "L2"}[case.norm]
    attack = APGDAttack(
        case.classifier, n_iter=case.steps, norm=norm, eps=case.eps, seed=0, loss="ce", device=case.images.device
    )
    return lambda: attack.perturb(case.images, case.labels)


LIBRARIES: dict[str, Library] = {
    "torchattacks": Library("torchattacks", "3.5.1", {"pgd": torchattacks_pgd, "apgd-ce": torchattacks_apgd}),
    "foolbox": Library("foolbox", "3.3.4", {"pgd": foolbox_pgd}),
    "ART": Library("art", "1.20.1", {"pgd": art_pgd, "apgd-ce": art_apgd}),
    "pyautoattack": Library("pyautoattack", "0.2.0", {"apgd-ce": pyautoattack_apgd}),
}
ROBUSTFPD: dict[str, Prepare] = {"pgd": robustfpd_pgd, "apgd-ce": robustfpd_apgd}


def bare_passes(case: AttackCase, forward: int, backward: int) -> Run:
    """Only passes, the lower bound of every attack: `forward` of the batch, `backward` of these with input gradient."""
    assert forward >= backward

    def run() -> Tensor:
        x = case.images.detach().clone()
        for _ in range(backward):
            x.requires_grad_()
            loss = nn.functional.cross_entropy(case.classifier(x), case.labels, reduction="sum")
            torch.autograd.grad(loss, x)
            x = x.detach()
        with torch.no_grad():
            for _ in range(forward - backward):
                case.classifier(x)
        return x

    return run


def _art_estimator(case: AttackCase) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        case.classifier, loss=nn.CrossEntropyLoss(), input_shape=tuple(case.images.shape[1:]),
        nb_classes=case.classes, clip_values=(0.0, 1.0),
        device_type="gpu" if case.images.device.type == "cuda" else "cpu",
    )  # fmt: skip


def _art_norm(case: AttackCase) -> float:
    return {"linf": float("inf"), "l2": 2}[case.norm]


def _art_run(attack: Any, case: AttackCase) -> Tensor:
    adversarial = attack.generate(case.images.cpu().numpy(), case.labels.cpu().numpy())
    return torch.from_numpy(adversarial).to(case.images)
