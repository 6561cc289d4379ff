"""Foolbox's minimal attacks: Carlini & Wagner in L2, DeepFool, DDN and FMN.

Carlini & Wagner, S&P 2017; Moosavi-Dezfooli et al., CVPR 2016; Rony et al., CVPR 2019; Pintor et al., NeurIPS 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters.base import ClassifierAdapter, search_batch
from robustfpd.attacks.base import attack
from robustfpd.attacks.inputs import positive
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError


@attack("deepfool", norms=("linf", "l2"), minimal=True, library="foolbox")
def deepfool(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 50,
    overshoot: float = 0.02, candidates: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """DeepFool: linearise, step onto the nearest boundary, repeat (Moosavi-Dezfooli et al., CVPR 2016).

    Arguments, result and errors as in `pgd`; `eps` and `generator` are not used.

    Options:
        steps: linearisations at most.
        overshoot: fraction by which the boundary is overstepped.
        candidates: likeliest classes to look at, the image's own among them; None takes all.
    """
    from foolbox import attacks

    positive(steps=steps)
    if overshoot < 0 or (candidates is not None and candidates < 2):
        raise InputError(f"overshoot must be ≥ 0 and candidates ≥ 2, found {overshoot} and {candidates}")
    kind = attacks.LinfDeepFoolAttack if norm == "linf" else attacks.L2DeepFoolAttack
    return _run(kind(steps=steps, overshoot=overshoot, candidates=candidates), classifier, images, labels)


@attack("ddn", norms=("l2",), minimal=True, library="foolbox")
def ddn(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "l2", steps: int = 200,
    gamma: float = 0.05, init_eps: float = 1.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Decoupled direction and norm: a sphere that shrinks after success, grows after failure (Rony et al., CVPR 2019).

    Arguments, result and errors as in `pgd`; `eps` and `generator` are not used.

    Options:
        steps: gradient steps.
        gamma: fraction by which the radius changes in each step.
        init_eps: first radius.
    """
    from foolbox import attacks

    positive(steps=steps, gamma=gamma, init_eps=init_eps)
    return _run(attacks.DDNAttack(init_epsilon=init_eps, steps=steps, gamma=gamma), classifier, images, labels)


@attack("fmn", minimal=True, library="foolbox")
def fmn(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 200,
    step_size: float = 1.0, gamma: float = 0.05, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Fast minimum norm: DDN's idea with a margin loss, in any norm (Pintor et al., NeurIPS 2021).

    Arguments, result and errors as in `pgd`; `eps` and `generator` are not used.

    Options:
        steps: gradient steps.
        step_size: Euclidean length of the first step; it falls to a hundredth along half a cosine.
        gamma: fraction by which the radius changes in the first step; it falls likewise.
    """
    from foolbox import attacks

    positive(steps=steps, step_size=step_size, gamma=gamma)
    kinds = {"linf": attacks.LInfFMNAttack, "l2": attacks.L2FMNAttack, "l1": attacks.L1FMNAttack}
    peer = kinds[norm](steps=steps, max_stepsize=step_size, gamma=gamma)
    # Theirs divides a norm by itself in L2, so that nothing is ever projected.
    onto = _into_l2_ball if norm == "l2" else peer.project
    # The radius is the distance to the linearised boundary: without an overshoot it is never crossed where boundaries
    # are flat.
    peer.project = lambda x, x0, epsilon: onto(x=x, x0=x0, epsilon=epsilon * 1.05)
    return _run(peer, classifier, images, labels)


def cw_l2(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, steps: int, step_size: float, confidence: float,
    initial_const: float, binary_search_steps: int,
) -> Tensor:  # fmt: skip
    """Carlini & Wagner in L2; see `cw`."""
    from foolbox import attacks

    peer = attacks.L2CarliniWagnerAttack(
        binary_search_steps=binary_search_steps, steps=steps, stepsize=step_size, confidence=confidence,
        initial_const=initial_const, abort_early=False,  # theirs looks at the whole batch's loss
    )  # fmt: skip
    # Where it finds nothing theirs returns a black image.
    return _run(peer, classifier, images, labels, failure=0.0)


def _run(
    peer: Any, classifier: nn.Module, images: Tensor, labels: Tensor, failure: float | None = None
) -> Tensor:  # fmt: skip
    from foolbox import PyTorchModel
    from foolbox.criteria import Misclassification

    def search(view: ClassifierAdapter, x: Tensor, y: Tensor) -> Tensor:
        model = PyTorchModel(view, bounds=(0, 1), device=x.device)
        found: Tensor = peer.run(model, x, Misclassification(y))
        if failure is None:
            return found
        return torch.where((found == failure).flatten(1).all(dim=1).reshape(-1, 1, 1, 1), x, found)

    return search_batch(classifier, images, labels, search)


def _into_l2_ball(x: Any, x0: Any, epsilon: Any) -> Any:
    delta = (x - x0).raw
    size = lp_ball("l2").norm(delta).clamp_min(1e-12)
    shrink = (epsilon.raw / size).clamp_max(1).reshape(-1, 1, 1, 1)
    return x0 + type(x0)(delta * shrink)
