from __future__ import annotations

import pytest
import torch
from torch import nn

import robustfpd as rf
from robustfpd import data
from robustfpd.config import DataConfig, ModelConfig, TaskConfig
from robustfpd.models.predict import predict


def test_confidence_is_what_it_says() -> None:
    """Of the shipped network on test images: close to how often it is right; after the tanh it never could be."""
    model = rf.load("digits/mini-fpd")
    images, labels = data.load(DataConfig()).test.floats()
    said = predict(model, images)
    sure, classes = said.probabilities.max(dim=1)
    right = float((classes == labels).float().mean())
    assert torch.equal(classes, model.classifier()(images).argmax(dim=1))
    assert abs(float(sure.mean()) - right) < 0.03
    assert float(model.classifier()(images).softmax(dim=1).detach().max()) < 0.46


def test_change_is_measured_in_grey_levels_of_the_cut_image() -> None:
    model = rf.load("digits/mini-fpd")
    images = data.load(DataConfig()).test.floats()[0][:3]
    said = predict(model, images)
    assert said.restored is not None
    assert said.change_rms is not None
    assert said.change_mean is not None
    assert float(said.restored.min()) >= 0
    assert float(said.restored.max()) <= 1
    apart = 255 * (said.restored[1] - images[1])
    assert float(said.change_rms[1]) == pytest.approx(float(apart.square().mean().sqrt()), rel=1e-5)
    assert float(said.change_mean[1]) == pytest.approx(float(apart.abs().mean()), rel=1e-5)


def test_plain_networks_restore_nothing_and_modes_stay() -> None:
    task = TaskConfig(num_classes=3, in_channels=1, image_size=(8, 8))
    plain = rf.build(task, ModelConfig(defence="none"))
    nn.Module.train(plain)
    said = predict(plain, torch.rand(2, 1, 8, 8))
    assert said.restored is None
    assert said.change_rms is None
    assert plain.training
    assert torch.allclose(said.probabilities.sum(dim=1), torch.ones(2))
