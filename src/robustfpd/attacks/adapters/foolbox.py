"""Foolbox's minimal attacks, DeepFool, DDN and FMN, and Carlini & Wagner (L2 from foolbox, L∞ from ART).

Moosavi-Dezfooli et al., CVPR 2016; Rony et al., CVPR 2019; Pintor et al., NeurIPS 2021; Carlini & Wagner, S&P 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters import ClassifierAdapter, minimize_batch
from robustfpd.attacks.adapters.art import cw_linf
from robustfpd.attacks.base import attack, check_positive
from robustfpd.attacks.norms import lp_ball, per_image
from robustfpd.config import Norm
from robustfpd.errors import InputError

FMN_OVERSHOOT = 1.05
"""FMN's radius is the distance to the linearised boundary. Without an overshoot flat boundaries are never crossed."""


@attack("deepfool", norms=("linf", "l2"), minimal=True, library="foolbox")
def deepfool(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 50,
    overshoot: float = 0.02, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """DeepFool: step onto the nearest linearised boundary among all K classes (Moosavi-Dezfooli et al., CVPR 2016).

    Arguments, result and errors as in `pgd`; `eps` and `generator` are not used.

    Options:
        steps: linearisations, at most.
        overshoot: fraction by which the boundary is crossed, at least 0.
    """
    from foolbox import attacks

    check_positive(steps=steps)
    if overshoot < 0:
        raise InputError(f"overshoot must be at least 0, found {overshoot}")
    kind = attacks.LinfDeepFoolAttack if norm == "linf" else attacks.L2DeepFoolAttack
    return _run(kind(steps=steps, overshoot=overshoot, candidates=None), classifier, images, labels)


@attack("ddn", norms=("l2",), minimal=True, library="foolbox")
def ddn(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "l2", steps: int = 200,
    gamma: float = 0.05, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Decoupled direction and norm: the radius shrinks after success, grows after failure (Rony et al., CVPR 2019).

    Arguments, result and errors as in `pgd`; `eps` and `generator` are not used.

    Options:
        steps: gradient steps.
        gamma: fraction by which the radius changes in each step.
    """
    from foolbox import attacks

    check_positive(steps=steps, gamma=gamma)
    return _run(attacks.DDNAttack(init_epsilon=1.0, steps=steps, gamma=gamma), classifier, images, labels)


@attack("fmn", minimal=True, library="foolbox")
def fmn(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 200,
    step_size: float = 1.0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Fast minimum norm: like DDN with a margin loss, in any norm (Pintor et al., NeurIPS 2021).

    Arguments, result and errors as in `pgd`; `eps` and `generator` are not used.

    Options:
        steps: gradient steps.
        step_size: Euclidean length of the first step; it decays to a hundredth along half a cosine.
    """
    from foolbox import attacks

    check_positive(steps=steps, step_size=step_size)
    kinds = {"linf": attacks.LInfFMNAttack, "l2": attacks.L2FMNAttack, "l1": attacks.L1FMNAttack}
    library_attack = kinds[norm](steps=steps, max_stepsize=step_size, gamma=0.05)
    # foolbox divides a norm by itself in L2, so that nothing is projected.
    project = _project_l2 if norm == "l2" else library_attack.project
    library_attack.project = lambda x, x0, epsilon: project(x=x, x0=x0, epsilon=epsilon * FMN_OVERSHOOT)
    return _run(library_attack, classifier, images, labels)


@attack("cw", norms=("linf", "l2"), minimal=True, library={"linf": "art", "l2": "foolbox"})
def cw(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    steps: int | None = None, step_size: float | None = None, confidence: float = 0.0, initial_const: float = 0.1,
    binary_search_steps: int = 9, largest_const: float = 20.0, decrease_factor: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Carlini & Wagner: minimize ‖δ‖ + const·max(z_y - max_{k≠y} z_k, -confidence) over tanh space (S&P 2017).

    L2 runs on foolbox. L∞ runs on ART, one image at a time, and is slow. Arguments, result and errors as in `pgd`;
    `eps` and `generator` are not used.

    Options:
        steps: Adam steps per constant (and limit); None takes 200 in L2, 100 in L∞.
        step_size: Adam's learning rate in tanh space; None takes 0.1 in L2, 0.05 times the limit in L∞.
        confidence: margin by which the wrong class must win.
        initial_const: first weight of misclassification against distance.
        binary_search_steps: constants tried per image (L2).
        largest_const: largest constant; each is ten times the one before (L∞).
        decrease_factor: factor on the limit of every pixel after a success, in (0, 1) (L∞).
    """
    check_positive(initial_const=initial_const, binary_search_steps=binary_search_steps, largest_const=largest_const)
    if not 0 < decrease_factor < 1:
        raise InputError(f"decrease_factor must lie between 0 and 1, found {decrease_factor}")
    steps = steps if steps is not None else 200 if norm == "l2" else 100
    step_size = step_size if step_size is not None else 0.1 if norm == "l2" else 0.05
    check_positive(steps=steps, step_size=step_size)
    if norm == "linf":
        return cw_linf(
            classifier, images, labels, step_size, max_iter=steps, confidence=confidence, initial_const=initial_const,
            largest_const=largest_const, decrease_factor=decrease_factor,
        )  # fmt: skip
    from foolbox import attacks

    library_attack = attacks.L2CarliniWagnerAttack(
        binary_search_steps=binary_search_steps, steps=steps, stepsize=step_size, confidence=confidence,
        initial_const=initial_const, abort_early=False,  # foolbox aborts by the loss of the whole batch
    )  # fmt: skip
    return _run(library_attack, classifier, images, labels, black_is_failure=True)


def _run(
    library_attack: Any, classifier: nn.Module, images: Tensor, labels: Tensor, *, black_is_failure: bool = False
) -> Tensor:
    """Run a foolbox attack; its C&W returns black images where it finds nothing."""
    from foolbox import PyTorchModel
    from foolbox.criteria import Misclassification

    def search(adapter: ClassifierAdapter, x: Tensor, y: Tensor) -> Tensor:
        model = PyTorchModel(adapter, bounds=(0, 1), device=x.device)
        candidates: Tensor = library_attack.run(model, x, Misclassification(y))
        if not black_is_failure:
            return candidates
        return torch.where(per_image((candidates == 0).flatten(1).all(dim=1)), x, candidates)

    return minimize_batch(classifier, images, labels, search)


def _project_l2(x: Any, x0: Any, epsilon: Any) -> Any:
    delta = (x - x0).raw
    length = lp_ball("l2").norm(delta).clamp_min(1e-12)
    return x0 + type(x0)(delta * per_image((epsilon.raw / length).clamp_max(1)))
