from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import robustfpd as rf
from robustfpd.provenance import weights_sha256


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())


def test_equal_weights_have_one_hash_in_any_layout() -> None:
    expected = weights_sha256(network())
    assert weights_sha256(copy.deepcopy(network())) == expected
    assert weights_sha256(network().to(memory_format=torch.channels_last)) == expected
    assert weights_sha256(network().eval().requires_grad_(False)) == expected


@pytest.mark.parametrize("name", list(network().state_dict()))
def test_every_weight_and_buffer_counts(name: str) -> None:
    changed = network()
    changed.state_dict()[name].view(-1)[-1] += 1
    assert weights_sha256(changed) != weights_sha256(network())


def test_types_shapes_and_names_count() -> None:
    zeros = [torch.zeros(2, 2), torch.zeros(4), torch.zeros(2, 2, dtype=torch.int32)]
    hashes = set()
    for name, tensor in [*(("a", z) for z in zeros), ("b", zeros[0])]:
        module = nn.Module()
        module.register_buffer(name, tensor)
        hashes.add(weights_sha256(module))
    assert len(hashes) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types_are_read_too(dtype: torch.dtype) -> None:
    module = nn.Module()
    for name, tensor in {"some": torch.ones(3, dtype=dtype), "none": torch.ones(0, dtype=dtype)}.items():
        module.register_buffer(name, tensor)
    first = weights_sha256(module)
    module.state_dict()["some"][0] = 2
    assert first is not None
    assert weights_sha256(module) != first


def test_sparse_tensors_have_no_hash() -> None:
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    assert weights_sha256(module) is None


def test_an_evaluation_records_the_hash_of_the_weights() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    model = rf.enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=4).eval()
    record = rf.evaluate(model, (images, labels), suite="first-look", eps=0.01)
    assert record.weights_sha256 == weights_sha256(model.classifier())
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    again = rf.evaluate(model, (images, labels), suite="first-look", eps=0.01)
    assert again.weights_sha256 != record.weights_sha256


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())
    assert citation["version"] == rf.__version__
