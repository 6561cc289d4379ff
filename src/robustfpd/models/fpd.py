"""The Feature Pyramid Decoder around a backbone, and the undefended baseline it is measured against.

Li et al., "Enhancing Intrinsic Adversarial Robustness via Feature Pyramid Decoder", CVPR 2020.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustfpd.config import ModelConfig, TaskConfig
from robustfpd.errors import InputError
from robustfpd.models.backbones import Network, normalisation
from robustfpd.models.checkpoint import write_model
from robustfpd.models.decoder import RestorationDecoder
from robustfpd.models.denoise import affinity, denoising_layer
from robustfpd.models.heads import classification_layer
from robustfpd.models.insertion import PYRAMID_LEVELS, Backbone
from robustfpd.models.ops.elu import to_elu

SMALL_IMAGE = 64
"""`small_stem: auto` removes the stem's downsampling for images with a side under this."""


class FPDOutput(NamedTuple):
    """What an FPD returns for N images."""

    logits: Tensor
    """N×K, squashed where the head squashes."""
    restored: Tensor
    """N×C×H×W, the restoration decoder's image; near [0, 1] once trained."""


class BaseClassifier(nn.Module, ABC):
    """A backbone with a classification layer: what FPD and its undefended baseline share."""

    def __init__(self, network: Network, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__()
        self.task = task
        self.config = config
        small = config.small_stem if config.small_stem != "auto" else min(task.image_size) < SMALL_IMAGE
        if config.activation == "elu":
            to_elu(network.module)
        outside = [i for i in config.denoise_after if not 0 <= i < len(network.stages)]
        if outside:
            raise InputError(
                f"denoise_after must index the stages 0 to {len(network.stages) - 1} ({', '.join(network.stages)}), "
                f"found {outside[0]}"
            )
        self.backbone = Backbone(
            network.module,
            network.stages,
            in_channels=task.in_channels,
            image_size=task.image_size,
            small_stem=bool(small),
            layout=network.layout,
            insert=self._insert,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", normalisation(config.mean or network.mean, task.in_channels, "mean"))
        self.register_buffer("std", normalisation(config.std or network.std, task.in_channels, "std"))

    @abstractmethod
    def classifier(self) -> nn.Module:
        """The plain module images N×C×H×W in [0, 1] → logits N×K."""

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` to a folder, atomically; `robustfpd.load` reads them."""
        write_model(Path(folder), self.state_dict(), self.task, self.config)

    def _insert(self, index: int, channels: int) -> nn.Module | None:
        return None

    def _features(self, images: Tensor, *, raw: bool = False) -> list[Tensor]:
        features: list[Tensor] = self.backbone(self._normalised(images), raw=raw)
        return features

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.dtype)  # float64 images, as numpy makes them, go through a float32 model
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _pooled(self, features: list[Tensor]) -> Tensor:
        pooled: Tensor = self.dropout(features[-1].mean(dim=(2, 3)))
        return pooled

    def _check(self, images: Tensor) -> None:
        expected = self.task.in_channels
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a torch.Tensor, found {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != expected:
            raise InputError(f"images must be N×{expected}×H×W, found shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"images must be floating point in [0, 1], found {images.dtype}; divide uint8 by 255")


class FPD(BaseClassifier):
    """Feature Pyramid Decoder: front pass, restoration, back pass with the same weights, constrained head.

    Shapes: images N×C×H×W in [0, 1] → `FPDOutput(logits N×K, restored N×C×H×W)`.

    Batch norm: both passes run through the same layers. In training each pass is normalised by its own
    batch statistics, and both feed the running averages, front pass first; in evaluation both use them.
    """

    def __init__(self, network: Network, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__(network, task, config)
        channels = self.backbone.channels
        levels = min(PYRAMID_LEVELS, len(channels))
        width = config.pyramid_channels or min(256, max(32, channels[-1] // 4))
        self.decoder = RestorationDecoder(
            channels[-levels:], self.backbone.reductions[-levels], width, task.in_channels,
            unstrided_kernel=config.unstrided_kernel,
        )  # fmt: skip
        self.affinity = affinity(config.denoise)
        self.head = classification_layer(config.head, channels[-1], task.num_classes, config.lipschitz)

    def forward(self, images: Tensor) -> FPDOutput:
        """Classify and restore images N×C×H×W in [0, 1].

        Shape and type are checked. Values are not: training noise leaves [0, 1]; attacks and `evaluate` check them.
        """
        restored = self.restore(images)
        return FPDOutput(self.head(self.back(restored, images)), restored)

    def with_maps(self, images: Tensor) -> tuple[FPDOutput, list[Tensor]]:
        """What `forward` gives, and the maps of the back pass, from which `again` goes on."""
        restored = self.restore(images)
        maps = self._features(self.middle_denoise(restored, images))
        return FPDOutput(self.head(self._pooled(maps)), restored), maps

    def again(self, maps: list[Tensor], restored: Tensor) -> FPDOutput:
        """Classify and restore once more what was restored, with a back pass's maps for those of another front pass.

        That back pass saw the same images, but for the middle denoising.
        """
        again = self._decoded(maps, restored.shape[-2:])
        return FPDOutput(self.head(self.back(again, restored)), again)

    def restore(self, images: Tensor) -> Tensor:
        """Front pass (FPD_FD) and restoration (FPD_R): images → restored images, N×C×H×W."""
        self._check(images)
        features = self._features(images, raw=self.config.pyramid_reads == "raw")
        return self._decoded(features, images.shape[-2:])

    def _decoded(self, features: list[Tensor], size: tuple[int, ...]) -> Tensor:
        levels, (height, width) = len(self.decoder.laterals), size
        restored: Tensor = self.decoder(features[-levels:], self.backbone.padded((height, width))).to(self.mean.dtype)
        if self.config.normalise == "once":
            restored = restored * self.std + self.mean
        return restored[:, :, :height, :width]

    def back(self, restored: Tensor, images: Tensor) -> Tensor:
        """Middle denoising and back pass (FPD_BD): restored images → pooled features, N×C."""
        return self._pooled(self._features(self.middle_denoise(restored, images)))

    def middle_denoise(self, restored: Tensor, images: Tensor) -> Tensor:
        """What the back pass sees: the restored image, plus non-local means of the input or of itself."""
        if self.config.middle == "none":
            return restored
        source = images if self.config.middle == "input" else restored
        if self.config.normalise == "once":  # in pixels what adding the affinity to a normalised image is
            return restored + self.std * self.affinity(self._normalised(source))
        return restored + self.affinity(source)

    def classifier(self, *, squash: bool = True) -> FPDClassifier:
        """The plain module images → logits; `squash=False` leaves out the head's squashing (adaptive attacks)."""
        return FPDClassifier(self, squash=squash)

    def _insert(self, index: int, channels: int) -> nn.Module | None:
        if index not in self.config.denoise_after:
            return None
        return denoising_layer(self.config.denoise, channels)


class FPDClassifier(nn.Module):
    """An FPD as others expect a classifier: images N×C×H×W in [0, 1] → logits N×K."""

    def __init__(self, fpd: FPD, *, squash: bool = True) -> None:
        super().__init__()
        self.fpd = fpd
        self.squash = squash

    @property
    def training(self) -> bool:
        """The FPD's own mode. A flag that went stale makes attack libraries switch the FPD to training."""
        fpd = self.__dict__.get("_modules", {}).get("fpd")
        return bool(fpd.training) if fpd is not None else True

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # train() and eval() reach the FPD as a child

    def forward(self, images: Tensor) -> Tensor:
        """Classify images."""
        features = self.fpd.back(self.fpd.restore(images), images)
        logits: Tensor = self.fpd.head(features) if self.squash else self.fpd.head.pre_squash(features)
        return logits


class Baseline(BaseClassifier):
    """The baseline: the same backbone, global average pooling and a linear layer, trained on the same images."""

    def __init__(self, network: Network, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__(network, task, config)
        self.head = classification_layer("linear", self.backbone.channels[-1], task.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images N×C×H×W in [0, 1]: logits N×K."""
        self._check(images)
        logits: Tensor = self.head(self._pooled(self._features(images)))
        return logits

    def classifier(self) -> Baseline:
        """Itself: it is a plain classifier already."""
        return self
