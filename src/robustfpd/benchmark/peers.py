"""Other libraries' attacks, called as their manuals say, on tensors in [0, 1].

Each does the same work: as many steps, of the same length, from one random start, on cross-entropy. A library that is
not installed, or has no such attack, is named in the tables.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.config import Norm
from robustfpd.rng import generator

OURS = "robustfpd"


@dataclass(frozen=True)
class Work:
    """What is attacked, and how."""

    classifier: nn.Module
    images: Tensor
    labels: Tensor
    eps: float
    norm: Norm
    steps: int
    step_size: float
    """Of PGD; APGD finds its own."""
    classes: int


Run = Callable[[], Tensor]
Attack = Callable[[Work], Run]


@dataclass(frozen=True)
class Peer:
    """A library."""

    package: str
    """As it is imported."""
    version: str
    """The one it was written for."""
    attacks: Mapping[str, Attack] = field(default_factory=dict)

    def missing(self, attack: str) -> str:
        """Why it cannot take part; empty where it can."""
        if attack not in self.attacks:
            return "has none"
        return "" if importlib.util.find_spec(self.package) is not None else "not installed"


def ours_pgd(work: Work) -> Run:
    """Our PGD, which goes on after an image has fallen, as the others do."""
    return lambda: attacks.get("pgd")(
        work.classifier, work.images, work.labels, eps=work.eps, norm=work.norm, steps=work.steps,
        step_size=work.step_size, early_stop=False, generator=generator(0, "benchmark"),
    )  # fmt: skip


def ours_apgd(work: Work) -> Run:
    """Our APGD, which lets images go that have fallen."""
    return lambda: attacks.get("apgd-ce")(
        work.classifier, work.images, work.labels, eps=work.eps, norm=work.norm, steps=work.steps,
        generator=generator(0, "benchmark"),
    )  # fmt: skip


def torchattacks_pgd(work: Work) -> Run:
    """`torchattacks.PGD` and `PGDL2`."""
    import torchattacks

    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[work.norm]
    peer = kind(work.classifier, eps=work.eps, alpha=work.step_size, steps=work.steps, random_start=True)
    return lambda: peer(work.images, work.labels)


def torchattacks_apgd(work: Work) -> Run:
    """`torchattacks.APGD`."""
    import torchattacks

    norm = {"linf": "Linf", "l2": "L2"}[work.norm]
    peer = torchattacks.APGD(work.classifier, norm=norm, eps=work.eps, steps=work.steps, n_restarts=1, loss="ce")
    return lambda: peer(work.images, work.labels)


def foolbox_pgd(work: Work) -> Run:
    """`foolbox.attacks.LinfPGD` and `L2PGD`."""
    from foolbox import PyTorchModel
    from foolbox import attacks as peers

    kind = {"linf": peers.LinfPGD, "l2": peers.L2PGD}[work.norm]
    model = PyTorchModel(work.classifier, bounds=(0, 1), device=work.images.device)
    peer = kind(abs_stepsize=work.step_size, steps=work.steps, random_start=True)
    return lambda: peer.run(model, work.images, work.labels, epsilon=work.eps)


def art_pgd(work: Work) -> Run:
    """`ProjectedGradientDescentPyTorch`, which works on tensors but takes and gives NumPy arrays."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    peer = ProjectedGradientDescentPyTorch(
        _estimator(work), norm=_order(work), eps=work.eps, eps_step=work.step_size, max_iter=work.steps,
        num_random_init=1, batch_size=len(work.images), verbose=False,
    )  # fmt: skip
    return lambda: _through_numpy(peer, work)


def art_apgd(work: Work) -> Run:
    """`AutoProjectedGradientDescent`, whose first step is given: twice eps, as its authors have it."""
    from art.attacks.evasion import AutoProjectedGradientDescent

    peer = AutoProjectedGradientDescent(
        _estimator(work), norm=_order(work), eps=work.eps, eps_step=2 * work.eps, max_iter=work.steps,
        nb_random_init=1, batch_size=len(work.images), loss_type="cross_entropy", verbose=False,
    )  # fmt: skip
    return lambda: _through_numpy(peer, work)


def pyautoattack_apgd(work: Work) -> Run:
    """`APGDAttack`, AutoAttack's own."""
    from pyautoattack.autopgd_base import APGDAttack

    norm = {"linf": "Linf", "l2": "L2"}[work.norm]
    peer = APGDAttack(
        work.classifier, n_iter=work.steps, norm=norm, eps=work.eps, seed=0, loss="ce", device=work.images.device
    )
    return lambda: peer.perturb(work.images, work.labels)


PEERS: dict[str, Peer] = {
    "torchattacks": Peer("torchattacks", "3.5.1", {"pgd": torchattacks_pgd, "apgd-ce": torchattacks_apgd}),
    "foolbox": Peer("foolbox", "3.3.4", {"pgd": foolbox_pgd}),
    "ART": Peer("art", "1.20.1", {"pgd": art_pgd, "apgd-ce": art_apgd}),
    "pyautoattack": Peer("pyautoattack", "0.2.0", {"apgd-ce": pyautoattack_apgd}),
}
OWN: dict[str, Attack] = {"pgd": ours_pgd, "apgd-ce": ours_apgd}


def floor(work: Work, forward: int, backward: int) -> Run:
    """Bare passes, nothing else: `forward` of the batch, of which `backward` go back to the input."""
    assert forward >= backward

    def run() -> Tensor:
        x = work.images.detach().clone()
        for _ in range(backward):
            x.requires_grad_()
            loss = nn.functional.cross_entropy(work.classifier(x), work.labels, reduction="sum")
            torch.autograd.grad(loss, x)
            x = x.detach()
        with torch.no_grad():
            for _ in range(forward - backward):
                work.classifier(x)
        return x

    return run


def _estimator(work: Work) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        work.classifier, loss=nn.CrossEntropyLoss(), input_shape=tuple(work.images.shape[1:]),
        nb_classes=work.classes, clip_values=(0.0, 1.0),
        device_type="gpu" if work.images.device.type == "cuda" else "cpu",
    )  # fmt: skip


def _order(work: Work) -> float:
    return {"linf": float("inf"), "l2": 2}[work.norm]


def _through_numpy(peer: Any, work: Work) -> Tensor:
    found = peer.generate(work.images.cpu().numpy(), work.labels.cpu().numpy())
    return torch.from_numpy(found).to(work.images)
