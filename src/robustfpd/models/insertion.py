"""A backbone as stages, with denoising layers inserted between them.

A module name says where a stage ends. Forward hooks on those modules collect the feature maps and replace a module's
output by its denoised version, so the network's own code, weights and weight names stay.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.device import evaluating
from robustfpd.errors import InputError, first_line
from robustfpd.models.backbones import BackboneSpec, prune, stage_map, undo_downsampling
from robustfpd.models.ops.elu import keep_inputs

PYRAMID_LEVELS = 4
"""The last four stages feed the pyramid (c2…c5); what comes before is the stem."""
MULTIPLES = (1, 4, 8, 16, 32)
"""Multiples of which an image's sides are tried: some families cannot add maps of odd sizes."""


class StagedBackbone(nn.Module):
    """Images N×C×H×W → one feature map per stage, finest first; a denoising layer may follow a stage.

    Args:
        spec: the network, which is changed, and the names of the modules where its stages end, in the order they run.
        in_channels: channels of an image.
        image_size: height and width of the images that it is built with.
        small_stem: remove the downsampling before the end of the pyramid's finest stage; `pool`: only the pooling.
        insert: (index of a stage, its channels) → the layer to insert after it, or None.
        tail: keep what runs after the last stage, for `classify`; else it is dropped.
        front_stages: number of stages that `forward` runs; None runs all.

    Raises:
        InputError: a stage is unknown, does not run exactly once, runs out of order, does not return a feature map or
            has it overwritten; or the network does not take such images.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        in_channels: int,
        image_size: tuple[int, int],
        small_stem: bool | str = False,
        insert: Callable[[int, int], nn.Module | None] = lambda stage, channels: None,
        tail: bool = False,
        front_stages: int | None = None,
    ) -> None:
        super().__init__()
        self.net = spec.module
        self.stage_names = tuple(spec.stages)
        self.inserted = nn.ModuleDict()
        self.layout = spec.layout
        self.multiple = 1
        """Images are padded to a multiple of this many pixels a side."""
        self.image_size = image_size
        self.leaves_early = True
        """Whether `forward` leaves the network in its last stage; it always leaves in an earlier one."""
        self.front = min(front_stages or len(self.stage_names), len(self.stage_names))
        """Number of stages that `forward` runs."""
        self.tail = tail

        image = torch.zeros(1, in_channels, *image_size)
        if small_stem:
            finest = self.stage_names[max(0, len(self.stage_names) - PYRAMID_LEVELS)]
            before = self._modules_until(finest, image)
            after = self._modules_after(finest, image)  # what later stages share with the stem stays
            removed = [m for m in before if m not in after and (small_stem != "pool" or not list(m.parameters()))]
            undo_downsampling(self.net, removed)
        for index, name in enumerate(self.stage_names):
            self.net.get_submodule(name).register_forward_hook(_StageEnd(self, index))
        needed = self._modules_until(None if tail else self.stage_names[-1], image)
        if not tail:
            self._drop_tail(needed, image)
        try:
            features = self._measure(image)
        except InputError:  # perhaps an activation overwrites a stage's output: then activations keep their inputs
            if not keep_inputs(self.net):
                raise
            features = self._measure(image)
        self.channels = tuple(f.shape[1] for f in features)
        self.reductions = tuple(round(max(self.padded(image_size)) / max(f.shape[-2:])) for f in features)
        for index, channels in enumerate(self.channels):
            layer = insert(index, channels)
            if layer is not None:
                self.inserted[str(index)] = layer
        if tail:
            return
        self.leaves_early = False  # exporters prefer the network's own code where it still works without its tail
        try:
            self._measure(image)
        except Exception:  # the user's code may raise anything here; leaving early skips it
            self.leaves_early = True

    def forward(self, images: Tensor, *, raw: bool = False, whole: bool = False) -> list[Tensor]:
        """Return the feature maps of the first `front` stages, finest first; of all with `whole`.

        With `raw` they are those before the inserted layers.
        """
        features: list[Tensor] = []
        stages = len(self.stage_names) if whole else self.front
        leaves = self.leaves_early or stages < len(self.stage_names)
        with suppress(_LastStageReached):
            self._call(images, _Collecting(features, raw, stages - 1 if leaves else None))
        return features

    def classify(self, images: Tensor) -> Tensor:
        """Return the output of the whole network, with the inserted layers: logits or features N×C, or maps N×C×H×W."""
        return _first_output(self._call(images, _Collecting(None, False, None)))

    def _call(self, images: Tensor, collecting: _Collecting) -> Any:
        """Run the network on images, padded; the hooks of this thread collect what `collecting` says."""
        height, width = images.shape[-2:]
        if self.multiple > 1:
            new_height, new_width = self.padded((height, width))
            images = F.pad(images, (0, new_width - width, 0, new_height - height), mode="replicate")
        outer = getattr(_thread, "collecting", None)  # this network may be a module inside another such
        _thread.collecting = collecting
        try:
            return self.net(images)
        except RuntimeError as error:
            if (height, width) == self.image_size or isinstance(error, (InputError, torch.OutOfMemoryError)):
                raise
            built = "×".join(map(str, self.image_size))
            raise InputError(
                f"the backbone was built for images of {built} pixels and does not take {height}×{width}: "
                f"{first_line(error)}; build it with that image_size, or resize the images"
            ) from error
        finally:
            _thread.collecting = outer

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width that the network sees for images of `size`."""
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width

    def _run(self, image: Tensor, *, whole: bool = False) -> list[Tensor]:
        """Return the feature maps of an image; with `whole`, check that the network takes it from end to end."""
        try:
            with evaluating(self.net), torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
                if whole:
                    self.classify(image)
                features: list[Tensor] = self(image, whole=True)
                return features
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if isinstance(error, InputError):
                raise
            _, channels, height, width = image.shape
            raise InputError(
                f"the backbone does not take images of {channels} channels and {height}×{width} pixels: "
                f"{first_line(error)[:200]}; another image_size, in_channels or small_stem=True may help"
                f"{', or tail=pooling, which drops the layers after the last stage' if self.tail else ''}"
            ) from error

    def _modules_until(self, end: str | None, image: Tensor) -> list[nn.Module]:
        """Return the modules that start before module `end` ends, in that order; choose `multiple` so that it ends.

        None is the end of the network.
        """
        ran: list[nn.Module] = []

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            raise _LastStageReached

        hooks = [m.register_forward_pre_hook(lambda module, args: ran.append(module)) for m in self.net.modules()]
        if end is not None:
            hooks.append(self.net.get_submodule(end).register_forward_hook(leave))
        with _removed(hooks):
            for self.multiple in MULTIPLES:
                try:
                    self._run(image, whole=end is None)
                    return ran
                except InputError as error:
                    if not isinstance(error.__cause__, RuntimeError):
                        raise
            self.multiple = 1
            self._run(image, whole=end is None)
        return ran

    def _modules_after(self, end: str, image: Tensor) -> set[nn.Module]:
        """Return the modules that start after module `end` has ended."""
        after: set[nn.Module] = set()
        ended: list[bool] = []
        hooks = [
            m.register_forward_pre_hook(lambda module, args: after.add(module) if ended else None)
            for m in self.net.modules()
        ]
        with (
            _removed([*hooks, self.net.get_submodule(end).register_forward_hook(lambda *_: ended.append(True))]),
            suppress(InputError),  # small images may not get through before downsampling is undone
        ):
            self._run(image)
        return after

    def _measure(self, image: Tensor) -> list[Tensor]:
        """Run once and check the stages' outputs; those of the front pass must not be overwritten."""
        order: list[int] = []
        versions: dict[int, int] = {}
        hooks = []
        for index, name in enumerate(self.stage_names):
            module = self.net.get_submodule(name)
            start = lambda m, args, out, i=index: order.append(i)  # noqa: E731
            # `_version` counts changes in place; a tuple's map is a copy, which cannot be changed.
            end = lambda m, args, out, i=index: versions.update({i: getattr(out, "_version", 0)})  # noqa: E731
            hooks += [module.register_forward_hook(start, prepend=True), module.register_forward_hook(end)]
        with _removed(hooks):
            features = self._run(image)
        missing = [name for i, name in enumerate(self.stage_names) if i not in order]
        if missing:
            raise InputError(f"stages {missing} do not run before stage {self.stage_names[-1]!r} ends")
        if order != list(range(len(self.stage_names))):
            ran = [self.stage_names[i] for i in order]
            raise InputError(f"stages must be named in the order they run, and run once each; they ran as {ran}")
        for index, (name, feature) in enumerate(zip(self.stage_names, features, strict=True)):
            if feature.ndim != 4:
                raise InputError(f"stage {name!r} must return a map N×C×H×W, found shape {tuple(feature.shape)}")
            if index < self.front and feature._version > versions.get(index, feature._version):
                raise InputError(
                    f"the output of stage {name!r} is overwritten in place by the next layer; "
                    "end the stage at that layer instead"
                )
        return features

    def _drop_tail(self, ran: Iterable[nn.Module], image: Tensor) -> None:
        """Replace by identities the modules with parameters that no feature map depends on.

        Modules without parameters stay: they cost nothing, and code may read their settings without calling them.
        """
        params = [p for p in self.net.parameters() if p.is_floating_point()]
        frozen = [p for p in params if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            with evaluating(self.net), torch.enable_grad():
                total = sum((f.sum() for f in self(image, whole=True)), torch.zeros(()))
                grads = torch.autograd.grad(total, params, allow_unused=True) if total.requires_grad else ()
        finally:
            for p in frozen:
                p.requires_grad_(False)
        needed = {id(m) for m in ran} | {id(p) for p, g in zip(params, grads, strict=False) if g is not None}
        prune(self.net, needed)


_thread = threading.local()
"""`collecting`: what this thread's forward pass collects, a `_Collecting`."""


class _Collecting(NamedTuple):
    """What a forward pass collects."""

    features: list[Tensor] | None
    """The stages' feature maps; None collects none."""
    raw: bool
    """Maps before the inserted layers."""
    last: int | None
    """Index of the stage in which the forward pass ends; None runs the whole network."""


class _StageEnd:
    """Forward hook at the end of a stage: collects its feature map and runs the inserted layer.

    An object and no closure, so that a copied backbone's hooks refer to the copy.
    """

    def __init__(self, backbone: StagedBackbone, index: int) -> None:
        self.backbone = backbone
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        feature, as_output = stage_map(output, self.backbone.stage_names[self.index], self.backbone.layout)
        features, raw, last = _thread.collecting
        if features is not None and raw:
            features.append(feature)
        if str(self.index) in self.backbone.inserted:
            denoised = self.backbone.inserted[str(self.index)](feature)
            feature = denoised.contiguous() if feature.is_contiguous() else denoised
            output = as_output(feature)
        if features is not None and not raw:
            features.append(feature)
        if self.index == last:
            raise _LastStageReached
        return output


class _LastStageReached(Exception):
    """Leaves a network whose remaining code need not, or cannot, run."""


def _first_output(output: Any) -> Tensor:
    """Return the logits of a network that may return auxiliary ones as well, as GoogLeNet does in training."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor):
        kind = type(first).__name__
        raise InputError(f"the network must return a tensor, or a tuple that begins with one, found {kind}")
    return first


@contextmanager
def _removed(hooks: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove hooks on exit."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
