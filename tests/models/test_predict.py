from __future__ import annotations

import pytest
import torch
from torch import nn

import robustfpd as rf
from robustfpd import data
from robustfpd.config import DataConfig, ModelConfig, TaskConfig
from robustfpd.models.predict import predict


def test_probabilities_are_the_softmax_of_pre_squash_logits() -> None:
    """They match the accuracy of a zoo model on test images; the softmax after the tanh could not."""
    trained = rf.load("digits/mini-fpd")
    model = rf.build(trained.task, trained.config.model_copy(update={"head": "tanh"})).eval()
    model.load_state_dict(trained.state_dict())
    images, labels = data.load(DataConfig()).test.floats()
    prediction = predict(model, images)
    confidence, classes = prediction.probabilities.max(dim=1)
    accuracy = float((classes == labels).float().mean())
    assert torch.equal(classes, model.classifier()(images).argmax(dim=1))
    assert abs(float(confidence.mean()) - accuracy) < 0.03
    assert float(model.classifier()(images).softmax(dim=1).detach().max()) < 0.46


def test_change_is_measured_in_grey_levels_of_the_clamped_image() -> None:
    model = rf.load("digits/mini-fpd")
    images = data.load(DataConfig()).test.floats()[0][:3]
    prediction = predict(model, images)
    assert prediction.restored is not None
    assert prediction.change_rms is not None
    assert prediction.change_mean is not None
    assert float(prediction.restored.min()) >= 0
    assert float(prediction.restored.max()) <= 1
    change = 255 * (prediction.restored[1] - images[1])
    assert float(prediction.change_rms[1]) == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)
    assert float(prediction.change_mean[1]) == pytest.approx(float(change.abs().mean()), rel=1e-5)


def test_baselines_restore_nothing_and_modes_stay() -> None:
    task = TaskConfig(num_classes=3, in_channels=1, image_size=(8, 8))
    plain = rf.build(task, ModelConfig(defence="none"))
    nn.Module.train(plain)
    prediction = predict(plain, torch.rand(2, 1, 8, 8))
    assert prediction.restored is None
    assert prediction.change_rms is None
    assert plain.training
    assert torch.allclose(prediction.probabilities.sum(dim=1), torch.ones(2))
