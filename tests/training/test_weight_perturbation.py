from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import AdversarialConfig, TrainingConfig, parse
from robustfpd.models import FPD
from robustfpd.training import OptimizerUpdate, adversarial_step, parameter_groups
from robustfpd.training.weight_perturbation import perturbed, weight_perturbations

Batch = tuple[Tensor, Tensor, Tensor]


def _loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels)


def test_the_perturbation_has_the_relative_radius_and_raises_the_loss() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    images, labels = torch.rand(16, 1, 3, 3), torch.randint(3, (16,))
    before = copy.deepcopy(net.state_dict())
    moves = weight_perturbations(net, lambda: _loss(net, images, labels), 0.02)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [weight.shape for weight, _ in moves] == [(8, 9), (3, 8)]  # no bias, no scale of the batch norm
    for weight, move in moves:
        assert float(move.norm() / weight.detach().norm()) == pytest.approx(0.02, rel=1e-4)
    own = _loss(net, images, labels).item()
    with perturbed(moves):
        raised = _loss(net, images, labels).item()
        with perturbed([(weight, -2 * move) for weight, move in moves]):
            lowered = _loss(net, images, labels).item()
    assert lowered < own < raised
    weights = {k: v for k, v in net.state_dict().items() if k.endswith("weight")}
    assert all(torch.allclose(before[k], v, atol=1e-6) for k, v in weights.items())


@pytest.mark.parametrize("batch_kind", ["joint", "both"])
def test_the_perturbation_leaves_weights_and_averages_of_both_passes(fpd: FPD, batch: Batch, batch_kind: str) -> None:
    clean, adversarial, labels = batch
    states = []

    class Stopped(RuntimeError):
        pass

    class FirstUpdate:
        def __call__(self, *_: object, **__: object) -> None:
            raise Stopped  # before the step, after the passes at the perturbed weights

    for awp in (0.0, 0.05):
        model = copy.deepcopy(fpd).train()
        settings = parse(AdversarialConfig, {"awp": awp, "batch": batch_kind, "gate": False})
        with pytest.raises(Stopped):
            adversarial_step(model, clean, adversarial, labels, FirstUpdate(), TrainingConfig(), settings)
        states.append(model.state_dict())
    for name, value in states[0].items():
        if not name.endswith(("running_mean", "running_var")):  # those follow the perturbed activations
            assert torch.allclose(value.float(), states[1][name].float(), atol=1e-6), name


def test_a_linear_loss_has_the_perturbation_along_its_gradient() -> None:
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, 4.0]]))
    direction = torch.tensor([[0.0, 2.0]])
    ((_, move),) = weight_perturbations(net, lambda: (net.weight * direction).sum(), 0.1)
    assert torch.allclose(move, torch.tensor([[0.0, 0.5]]))


def test_weights_are_restored_after_an_error() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="inside"), perturbed([(weight, torch.ones(2, 2))]):
        raise RuntimeError("inside")
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("objective", ["mixed", "madry", "trades", "mart"])
def test_a_step_takes_the_gradient_at_the_perturbed_weights(fpd: FPD, batch: Batch, objective: str) -> None:
    clean, adversarial, labels = batch
    settings = parse(AdversarialConfig, {"objective": objective, "awp": 0.05, "second_pass": False, "gate": False})
    plain, config = settings.model_copy(update={"awp": 0.0}), TrainingConfig()
    stepped, reference = copy.deepcopy(fpd), copy.deepcopy(fpd)

    def update(model: FPD) -> OptimizerUpdate:
        return OptimizerUpdate(torch.optim.SGD(parameter_groups(model), lr=0.1))

    def gradient_step(model: FPD, settings: AdversarialConfig) -> None:
        adversarial_step(model, clean, adversarial, labels, update(model), config, settings)

    gradient_step(stepped, settings)

    # By hand: the plain step's displacement at w and at w + v; v from the plain loss's gradient, which is the
    # displacement of a plain step with learning rate 1.
    at_weights = copy.deepcopy(fpd)
    gradient_step(at_weights, plain)
    with torch.no_grad():
        for w, after in zip(reference.parameters(), at_weights.parameters(), strict=True):
            gradient = w - after
            if w.ndim > 1 and float(gradient.norm()) > 0:
                w.add_(0.05 * w.norm() * gradient / gradient.norm())
    moved = {name: w.detach().clone() for name, w in reference.named_parameters()}
    gradient_step(reference, plain)
    expected = torch.cat([(after - moved[n]).flatten() for n, after in reference.named_parameters()])
    for model, same in ((stepped, True), (at_weights, False)):
        steps = zip(model.parameters(), fpd.parameters(), strict=True)
        displacement = torch.cat([(after - before).flatten() for after, before in steps])
        distance = float((displacement - expected).detach().norm() / expected.detach().norm())
        assert (distance < 1e-3) == same
