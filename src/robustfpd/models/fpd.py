"""The Feature Pyramid Decoder around a backbone, and the undefended baseline that it is compared with.

Li et al., "Enhancing Intrinsic Adversarial Robustness via Feature Pyramid Decoder", CVPR 2020, section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn
from torch.func import functional_call

from robustfpd.config import Head, ModelConfig, TaskConfig
from robustfpd.device import evaluating
from robustfpd.errors import InputError
from robustfpd.models.backbones import BackboneSpec, channel_constants
from robustfpd.models.checkpoint import CONFIG, WEIGHTS, write_model, write_model_files
from robustfpd.models.classifier import OwnClassifier, take_classifier
from robustfpd.models.decoder import RestorationDecoder
from robustfpd.models.denoise import denoising_layer, non_local_means
from robustfpd.models.front_statistics import FrontStatistics
from robustfpd.models.heads import ClassificationLayer, classification_layer
from robustfpd.models.insertion import PYRAMID_LEVELS, StagedBackbone
from robustfpd.models.ops.elu import to_elu
from robustfpd.rng import generator

SMALL_IMAGE = 64
"""`small_stem="auto"` removes the stem's downsampling for images with a side below this, in pixels."""


class FPDOutput(NamedTuple):
    """Output of an FPD for N images."""

    logits: Tensor
    """N×K, in (-1, 1) with the tanh head."""
    restored: Tensor
    """N×C×H×W, the restored images x′; not clamped, near [0, 1] once trained."""


class BaseClassifier(
    nn.Module,
    PyTorchModelHubMixin,
    ABC,
    library_name="robustfpd",
    pipeline_tag="image-classification",
    tags=["adversarial-robustness"],
    paper_url="https://arxiv.org/abs/2005.02552",
):
    """A backbone and a head: the base class of the FPD and its undefended baseline.

    With `tail: own` the backbone is the whole network; its last linear layer becomes the head. With `pooling` it ends
    with the last stage, and a new head follows the global average pooling.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's, with the files that `save` writes.

    Args:
        spec: the backbone; its module is changed.
        task: classes, channels and size of the images.
        config: the model's settings.

    Raises:
        InputError: a setting that does not fit the backbone or the task.
    """

    _hub_mixin_config: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # or the mixin keeps a copy of the backbone

    def __init__(self, spec: BackboneSpec, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__()
        self.task = task
        self.config = config
        self.memory_format = torch.channels_last  # convolutions are fastest in it, on CPUs and GPUs
        if config.activation == "elu":
            to_elu(spec.module)
        stages, front = f"{len(spec.stages)} stages ({', '.join(spec.stages)})", config.front_stages or 1
        outside = [i for i in config.denoise_after if not 0 <= i < len(spec.stages)]
        if outside and config.denoise != "none":
            raise InputError(f"denoise_after counts the {stages} from 0, found {outside[0]}")
        if front > len(spec.stages):
            raise InputError(f"front_stages must be at most the number of {stages}, found {front}")
        small = min(task.image_size) < SMALL_IMAGE
        small_stem = {"auto": small, "new": small and spec.new}.get(str(config.small_stem), config.small_stem)
        self.backbone = StagedBackbone(
            spec, in_channels=task.in_channels, image_size=task.image_size, small_stem=small_stem, insert=self._insert,
            tail=config.tail == "own", front_stages=config.front_stages,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", channel_constants(config.mean or spec.mean, task.in_channels, "mean"))
        self.register_buffer("std", channel_constants(config.std or spec.std, task.in_channels, "std"))

    @abstractmethod
    def classifier(self) -> nn.Module:
        """Return the module images N×C×H×W in [0, 1] → logits N×K."""

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` to a folder, atomically; `robustfpd.load` reads them.

        Raises:
            InputError: `folder` is a file or holds other files.
        """
        write_model(Path(folder), self.state_dict(), self.task, self.config)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model_files(save_directory, self.state_dict(), self.task, self.config)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, net: nn.Module | None = None, trust_code: bool = False, **hub: Any
    ) -> Self:
        from robustfpd.models.factory import load  # which imports this module

        folder = Path(model_id)
        if not folder.is_dir():
            options = {k: hub[k] for k in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
            folder = Path(snapshot_download(model_id, allow_patterns=[CONFIG, WEIGHTS], **options))
        model = load(folder, net=net, trust_code=trust_code)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise InputError(f"the model in {model_id} is no {cls.__name__}; load it with {kind}.from_pretrained")
        return model

    def _insert(self, stage: int, channels: int) -> nn.Module | None:
        """Return the layer to insert after a stage, or None."""
        return None

    def _check(self, images: Tensor) -> None:
        expected = self.task.in_channels
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a torch.Tensor, found {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != expected:
            raise InputError(f"images must be N×{expected}×H×W, found shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"images must be floating point in [0, 1], found {images.dtype}; divide uint8 by 255")

    def _normalised(self, images: Tensor) -> Tensor:
        self._check(images)
        images = images.to(self.mean.dtype)  # numpy's float64 images go through a float32 model
        return ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)

    def _pooled(self, images: Tensor) -> Tensor:
        """Run the whole backbone, N×C×H×W → features N×C in front of the head, and apply dropout."""
        if self.config.tail == "own":
            features = self.backbone.classify(self._normalised(images))
        else:
            features = self.backbone(self._normalised(images), whole=True)[-1]
        pooled: Tensor = self.dropout(features.mean(dim=(2, 3)) if features.ndim == 4 else features)
        return pooled

    def _head(self, kind: Head) -> ClassificationLayer:
        """Return the head: the network's own last linear layer, taken out of the backbone, or a new one."""
        task, config, backbone = self.task, self.config, self.backbone
        own = OwnClassifier(backbone.channels[-1], None)
        if config.tail == "own":
            image = torch.rand(1, task.in_channels, *task.image_size, generator=generator(0, "classifier"))
            with evaluating(backbone):
                last_stage = backbone.net.get_submodule(backbone.stage_names[-1])
                own = take_classifier(backbone.net, last_stage, lambda: backbone.classify(image), task.num_classes)
        if not own.logits:
            return classification_layer(kind, own.channels, task.num_classes, config.lipschitz, linear=own.linear)
        if kind != "linear":
            raise InputError(
                f"head={kind} bounds a network's last linear layer, but other layers follow it in this network; "
                "leave head out, or set tail=pooling"
            )
        return ClassificationLayer(nn.Identity(), bound=1.0)


class FPD(BaseClassifier):
    """Feature Pyramid Decoder: front pass, restoration, back pass with the same weights, constrained head.

    Shapes: images N×C×H×W in [0, 1] → `FPDOutput(logits N×K, restored N×C×H×W)`.

    The front pass runs the first `front_stages` stages, the back pass the whole backbone, with the same weights. Under
    the protocol `improved`, at initialisation the restored images equal the input, and the logits equal those of the
    backbone unless the number of classes differs.

    Both passes run through the same batch norms. In training each pass is normalised by its own batch statistics; in
    evaluation by its own running averages, or with `pass_statistics: shared` both by one, which both update in
    training, front pass first.

    Args and errors are those of `BaseClassifier`.
    """

    def __init__(self, spec: BackboneSpec, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__(spec, task, config)
        front = self.backbone.front
        levels = min(PYRAMID_LEVELS, front)
        channels, reduction = self.backbone.channels[front - levels : front], self.backbone.reductions[front - levels]
        width = config.pyramid_channels or min(256, max(32, channels[-1] // 4))
        self.decoder = RestorationDecoder(
            channels, reduction, width, task.in_channels, unstrided_kernel=config.unstrided_kernel,
            start_at_zero=config.restoration == "residual",
        )  # fmt: skip
        self.front_statistics = FrontStatistics(self.backbone, task) if config.pass_statistics == "own" else None
        self.non_local_means = non_local_means(config.denoise, gate=config.denoise_gate)
        gated = config.denoise_gate and config.middle != "none"
        self.middle_gate = nn.Parameter(torch.zeros(())) if gated else None
        self.head = self._head(config.head)

    def forward(self, images: Tensor, middle_noise: Tensor | None = None, *, restore: bool = True) -> FPDOutput:
        """Classify and restore images.

        Args:
            images: N×C×H×W in [0, 1]. Training noise may exceed this range, so it is not checked here.
            middle_noise: N×C×H×W, added to the input of the back pass; for training.
            restore: run the front pass and the restoration; else x′ = x, and the backbone classifies alone.

        Raises:
            InputError: images of another shape or type.
        """
        self._check(images)
        restored = self.restore(images) if restore else images  # FPD_FD, FPD_R
        features = self.back(restored, images, middle_noise)  # FPD_BD
        return FPDOutput(self.head(features), restored)  # FPD_LCC

    def restore(self, images: Tensor) -> Tensor:
        """Front pass (FPD_FD) and restoration (FPD_R): images x → restored images x′, both N×C×H×W.

        With `restoration: residual`, x′ = x + s R(c2…c5), and R is 0 at initialisation; else x′ = R(c2…c5).
        """
        features = self._front_features(images)
        height, width = images.shape[-2:]
        c2_to_c5 = features[-len(self.decoder.laterals) :]
        restored: Tensor = self.decoder(c2_to_c5, self.backbone.padded((height, width))).to(self.mean.dtype)
        restored = restored[:, :, :height, :width]
        if self.config.normalise == "once":
            restored = restored * self.std
        if self.config.restoration == "residual":
            return images + self.config.restoration_scale * restored
        return restored + self.mean if self.config.normalise == "once" else restored

    def _front_features(self, images: Tensor) -> list[Tensor]:
        """Run the front pass with its own running averages, if it has them: feature maps, finest first."""
        options, normalised = {"raw": self.config.pyramid_reads == "raw"}, self._normalised(images)
        averages = {} if self.front_statistics is None else self.front_statistics.by_name()
        features: list[Tensor] = functional_call(self.backbone, averages, (normalised,), options)
        return features

    def middle_denoise(self, restored: Tensor, images: Tensor, *, constant: bool = False) -> Tensor:
        """Middle denoising: `x̃ = x′ + g (x xᵀ) x / P`, N×C×H×W, for the dot product.

        Published code takes the means of the input x (`middle="input"`), `restored` takes those of x′, and `none`, as
        in the paper's figure, adds nothing. The gate g is learned and 0 at initialisation; 1 without `denoise_gate`.
        With `constant`, gradients do not flow through the means.
        """
        if self.config.middle == "none":
            return restored
        source = images if self.config.middle == "input" else restored
        source = source.detach() if constant else source
        if self.config.normalise == "once":  # the means of normalised images, in units of pixels
            means = self.std * self.non_local_means(self._normalised(source))
        else:
            means = self.non_local_means(source)
        return restored + (means if self.middle_gate is None else self.middle_gate * means)

    def back(
        self, restored: Tensor, images: Tensor, noise: Tensor | None = None, *, constant_means: bool = False
    ) -> Tensor:
        """Middle denoising and back pass (FPD_BD): restored images x′ and images x → features N×C for the head."""
        x = self.middle_denoise(restored, images, constant=constant_means)
        return self._pooled(x if noise is None else x + noise)

    def classifier(self, *, squash: bool = True) -> FPDClassifier:
        """Return the module images N×C×H×W in [0, 1] → logits N×K, the form that attacks and exporters take.

        Args:
            squash: apply the head's squashing function. False returns pre-squash logits, for adaptive attacks.
        """
        return FPDClassifier(self, squash=squash)

    def _insert(self, stage: int, channels: int) -> nn.Module | None:
        if stage not in self.config.denoise_after:
            return None
        return denoising_layer(self.config.denoise, channels, gate=self.config.denoise_gate)


class FPDClassifier(nn.Module):
    """An FPD as a plain classifier: images N×C×H×W in [0, 1] → logits N×K."""

    def __init__(self, fpd: FPD, *, squash: bool = True) -> None:
        super().__init__()
        self.fpd = fpd
        self.squash = squash

    @property
    def training(self) -> bool:
        """The FPD's own mode. A stale flag of the wrapper makes attack libraries switch the FPD to training."""
        fpd = self.__dict__.get("_modules", {}).get("fpd")
        return bool(fpd.training) if fpd is not None else True

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # train() and eval() reach the FPD as a child

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images."""
        features = self.fpd.back(self.fpd.restore(images), images)
        logits: Tensor = self.fpd.head(features) if self.squash else self.fpd.head.pre_squash(features)
        return logits


class Baseline(BaseClassifier):
    """The undefended baseline: the same backbone and a linear layer.

    Args and errors are those of `BaseClassifier`.
    """

    def __init__(self, spec: BackboneSpec, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__(spec, task, config)
        self.head = self._head("linear")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of images N×C×H×W in [0, 1].

        Raises:
            InputError: images of another shape or type.
        """
        logits: Tensor = self.head(self._pooled(images))
        return logits

    def classifier(self) -> Baseline:
        """Return the model itself, which is a plain classifier."""
        return self
