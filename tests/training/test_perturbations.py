from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustfpd.attacks.norms import lp_ball
from robustfpd.config import AdversarialConfig, TrainingConfig, parse
from robustfpd.models import FPD
from robustfpd.training.objectives import divergence
from robustfpd.training.perturbations import adversarial_images, attacked_view, noisy_images

Batch = tuple[Tensor, Tensor, Tensor]


def test_noise_has_the_half_width_of_the_settings_in_their_space(fpd: FPD) -> None:
    fpd.std.fill_(0.5)
    clean = torch.rand(50, 1, 8, 8)
    for space, unit in (("pixels", 1.0), ("normalised", 0.5)):
        config = parse(TrainingConfig, {"noise": 0.2, "space": space})
        noise = noisy_images(fpd, clean, config, torch.Generator().manual_seed(0)) - clean
        assert 0.99 < float(noise.abs().max()) / (0.2 * unit) < 1.001


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "fgsm-rs"])
def test_adversarial_images_stay_in_their_ball_which_grows_and_leave_the_model_unchanged(
    fpd: FPD, batch: Batch, attack: str
) -> None:
    clean, _, labels = batch
    settings = parse(AdversarialConfig, {"attack": attack, "eps": 0.2, "steps": 3, "warmup": 2.0, "start_epoch": 1})
    before = copy.deepcopy(fpd.state_dict())
    assert adversarial_images(fpd, clean, labels, settings, 1.0) is None
    distances = []
    for epoch in (1.5, 2.0, 3.0, 9.0):
        adversarial = adversarial_images(fpd, clean, labels, settings, epoch, torch.Generator().manual_seed(0))
        assert adversarial is not None
        assert not adversarial.requires_grad
        assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
        distances.append(float((adversarial - clean).abs().max()))
    assert distances == pytest.approx([0.05, 0.1, 0.2, 0.2], abs=1e-5)
    assert fpd.training
    assert all(torch.equal(before[k], v) for k, v in fpd.state_dict().items())
    assert all(p.grad is None for p in fpd.parameters())


@pytest.mark.parametrize("objective", ["mixed", "trades"])
def test_the_ball_is_that_of_the_norm(fpd: FPD, batch: Batch, objective: str) -> None:
    clean, _, labels = batch
    settings = parse(AdversarialConfig, {"norm": "l2", "eps": 0.5, "steps": 3, "objective": objective})
    adversarial = adversarial_images(fpd, clean, labels, settings, generator=torch.Generator().manual_seed(0))
    assert adversarial is not None
    distances = (adversarial - clean).flatten(1).norm(dim=1)
    assert 0.25 < float(distances.max()) < 0.5001


def test_halves_attacks_the_second_half_alone(fpd: FPD, batch: Batch) -> None:
    clean, _, labels = batch
    settings = AdversarialConfig(batch="halves", eps=0.1, steps=1)
    adversarial = adversarial_images(fpd, clean[:5], labels[:5], settings)
    assert adversarial is not None
    assert len(adversarial) == 3
    assert float((adversarial - clean[2:5]).abs().max()) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("labels", ["predicted", "true"])
def test_the_attack_leads_away_from_the_prediction_or_the_true_class(
    fpd: FPD, batch: Batch, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, _, true = batch
    targets: list[Tensor] = []

    def recorded(classifier: object, images: Tensor, labels: Tensor, **_: object) -> Tensor:
        targets.append(labels)
        return images

    monkeypatch.setattr("robustfpd.training.perturbations.pgd", recorded)
    adversarial_images(fpd, clean, true, parse(AdversarialConfig, {"labels": labels}))
    with torch.no_grad():
        predicted = copy.deepcopy(fpd).eval()(clean).logits.argmax(dim=1)
    assert not torch.equal(predicted, true)
    assert torch.equal(targets[0], predicted if labels == "predicted" else true)


def test_fgsm_takes_one_step_from_the_image(fpd: FPD, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, object] = {}

    def recorded(classifier: object, images: Tensor, labels: Tensor, **given: object) -> Tensor:
        options.update(given)
        return images

    monkeypatch.setattr("robustfpd.training.perturbations.pgd", recorded)
    clean, _, labels = batch
    for step_size, expected in ((None, 0.2), (0.1, 0.1)):
        settings = parse(AdversarialConfig, {"attack": "fgsm", "eps": 0.2, "step_size": step_size})
        adversarial_images(fpd, clean, labels, settings)
        assert (options["steps"], options["step_size"], options["random_start"]) == (1, expected, False)


@pytest.mark.parametrize(("step_size", "length"), [(None, 0.25), (0.1, 0.1)])
def test_fgsm_rs_returns_one_step_from_a_random_start(
    fpd: FPD, batch: Batch, step_size: float | None, length: float
) -> None:
    clean, _, labels = batch
    settings = parse(AdversarialConfig, {"attack": "fgsm-rs", "eps": 0.2, "step_size": step_size, "labels": "true"})
    found = adversarial_images(fpd, clean, labels, settings, generator=torch.Generator().manual_seed(3))
    start = (clean + lp_ball("linf").sample(clean, 0.2, torch.Generator().manual_seed(3))).clamp(0, 1).requires_grad_()
    classifier = attacked_view(copy.deepcopy(fpd).eval(), settings)
    (gradient,) = torch.autograd.grad(cross_entropy(classifier(start), labels), start)
    step = clean + (start + length * gradient.sign() - clean).clamp(-0.2, 0.2)
    assert found is not None
    assert torch.allclose(found, step.clamp(0, 1), atol=1e-6)


def test_the_attack_of_trades_maximizes_the_divergence_from_the_clean_logits(fpd: FPD, batch: Batch) -> None:
    clean, _, labels = batch
    common = {"eps": 0.2, "steps": 5, "labels": "true"}
    classifier = attacked_view(copy.deepcopy(fpd).eval(), AdversarialConfig())
    with torch.no_grad():
        logits = classifier(clean)
        reached = {}
        for objective in ("trades", "madry"):
            settings = parse(AdversarialConfig, {**common, "objective": objective})
            with torch.enable_grad():
                found = adversarial_images(fpd, clean, labels, settings, generator=torch.Generator().manual_seed(0))
            assert found is not None
            reached[objective] = classifier(found)
        noisy = classifier((clean + 0.2 * (2 * torch.rand_like(clean) - 1)).clamp(0, 1))
    far = {name: float(divergence(logits, found).mean()) for name, found in reached.items()}
    loss = {name: float(cross_entropy(found, labels)) for name, found in reached.items()}
    assert far["trades"] > 2 * float(divergence(logits, noisy).mean())
    assert loss["madry"] >= loss["trades"]
