"""Any CNN as a list of stages, with denoising layers inserted where stages end.

A stage's end is a module name. Forward hooks on those modules collect the feature maps and replace the
module's output by its denoised version, so the network's own code, weights and weight names stay.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.errors import InputError, first_line, unknown_name
from robustfpd.models.mode import evaluating
from robustfpd.models.ops.elu import keep_inputs

PYRAMID_LEVELS = 4
"""The last four stages feed the pyramid (c2…c5); what comes before is the stem."""


class Backbone(nn.Module):
    """Stages of a network: images N×C×H×W → one feature map per stage, finest first."""

    def __init__(
        self,
        net: nn.Module,
        stages: Sequence[str],
        *,
        in_channels: int,
        image_size: tuple[int, int],
        small_stem: bool = False,
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        insert: Callable[[int, int], nn.Module | None] = lambda index, channels: None,
    ) -> None:
        """Take over `net` (it is changed: give a copy to keep the original).

        Args:
            net: the network. Everything that runs after the last stage is dropped.
            stages: names of the modules where stages end, in the order they run.
            in_channels: channels of an image.
            image_size: height and width, for the measuring pass.
            small_stem: remove the downsampling up to the end of the pyramid's finest stage.
            layout: axes of the maps that the network passes between its stages.
            insert: (index of the stage, its channels) → layer to run on the stage's output, or None.

        Raises:
            InputError: a stage is unknown, does not run exactly once, runs out of order, does not
                return a feature map or has it overwritten; or the network does not take such images.
        """
        super().__init__()
        self.net = net
        self.stage_names = tuple(stages)
        self._check_names()
        self.inserted = nn.ModuleDict()
        self.layout = layout
        self.multiple = 1
        self.image_size = image_size
        self._leaves_early = True

        image = torch.zeros(1, in_channels, *image_size)
        if small_stem:
            finest = self.stage_names[max(0, len(self.stage_names) - PYRAMID_LEVELS)]
            ran = self._trace(image, finest)
            again = self._run_again(image, finest)
            self._undo_downsampling([m for m in ran if m not in again])
        for index, name in enumerate(self.stage_names):
            self.net.get_submodule(name).register_forward_hook(_StageEnd(self, index))
        self._drop_tail(self._trace(image, self.stage_names[-1]), image)
        features = self._undisturbed(image)
        self.channels = tuple(f.shape[1] for f in features)
        self.reductions = tuple(round(max(self.padded(image_size)) / max(f.shape[-2:])) for f in features)
        for index, channels in enumerate(self.channels):
            layer = insert(index, channels)
            if layer is not None:
                self.inserted[str(index)] = layer
        self._leaves_early = not self._runs_to_the_end(image)

    def forward(self, x: Tensor, *, raw: bool = False) -> list[Tensor]:
        """Map images to the stages' feature maps, denoised where inserted; `raw` returns them as before that."""
        height, width = x.shape[-2:]
        if self.multiple > 1:
            new_height, new_width = self.padded((height, width))
            x = F.pad(x, (0, new_width - width, 0, new_height - height), mode="replicate")
        features: list[Tensor] = []
        outer = getattr(_thread, "pass_", None)  # this network may be a module inside another such
        _thread.pass_ = (features, raw)
        try:
            self.net(x)
        except _LastStageReached:
            pass
        except RuntimeError as error:
            if (height, width) == self.image_size or isinstance(error, (InputError, torch.OutOfMemoryError)):
                raise
            built = "×".join(map(str, self.image_size))
            raise InputError(
                f"the backbone was built for images of {built} pixels and does not take {height}×{width}: "
                f"{first_line(error)}; build it with that image_size, or resize the images"
            ) from error
        finally:
            _thread.pass_ = outer
        return features

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the network sees: the next multiples of what it can halve evenly."""
        height, width = (-(-side // self.multiple) * self.multiple for side in size)
        return height, width

    def _check_names(self) -> None:
        names = [name for name, _ in self.net.named_modules() if name]
        if not self.stage_names:
            raise InputError("stages must name at least one module of the network, found none")
        for name in self.stage_names:
            if name not in names:
                raise unknown_name("stage", name, names)
        if len(set(self.stage_names)) != len(self.stage_names):
            raise InputError(f"stages must differ, found {list(self.stage_names)}")

    def _trace(self, image: Tensor, last: str) -> list[nn.Module]:
        """Return the modules that run until the module `last` has, in the order they start."""
        ran: list[nn.Module] = []
        end = self.net.get_submodule(last)

        def enter(module: nn.Module, args: Any) -> None:
            ran.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            raise _LastStageReached

        handles = [m.register_forward_pre_hook(enter) for m in self.net.modules()]
        handles.append(end.register_forward_hook(leave))
        try:
            self._fit(image)
        finally:
            for handle in handles:
                handle.remove()
        return ran

    def _run_again(self, image: Tensor, end: str) -> set[nn.Module]:
        """Modules that run again after stage `end` has: what is done to them would be done to later stages too."""
        again: set[nn.Module] = set()
        ended = False

        def enter(module: nn.Module, args: Any) -> None:
            if ended:
                again.add(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal ended
            ended = True

        handles = [m.register_forward_pre_hook(enter) for m in self.net.modules()]
        handles.append(self.net.get_submodule(end).register_forward_hook(leave))
        try:
            with suppress(InputError):  # such small images may not get through before downsampling is undone
                self._run(image)
        finally:
            for handle in handles:
                handle.remove()
        return again

    def _fit(self, image: Tensor) -> None:
        """Run, padding images to a multiple where it takes that: some families cannot add maps of odd sizes."""
        for self.multiple in (1, 4, 8, 16, 32):
            try:
                self._run(image)
                return
            except InputError as error:
                if not isinstance(error.__cause__, RuntimeError):
                    raise
        self.multiple = 1
        self._run(image)

    def _run(self, image: Tensor) -> list[Tensor]:
        try:
            with evaluating(self.net), torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
                features: list[Tensor] = self(image)
                return features
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if isinstance(error, InputError):
                raise
            _, channels, height, width = image.shape
            raise InputError(
                f"the backbone does not take images of {channels} channels and {height}×{width} pixels: "
                f"{first_line(error)[:200]}; another image_size or small_stem=True may help"
            ) from error

    def _undisturbed(self, image: Tensor) -> list[Tensor]:
        """Measure; activations that would overwrite a stage's output leave their inputs alone from then on."""
        try:
            return self._measure(image)
        except InputError:
            if not keep_inputs(self.net):
                raise
        return self._measure(image)

    def _measure(self, image: Tensor) -> list[Tensor]:
        """Run once and check what the stages deliver."""
        order: list[int] = []
        versions: dict[int, int] = {}
        handles = []
        for index, name in enumerate(self.stage_names):
            module = self.net.get_submodule(name)
            start = lambda m, args, out, i=index: order.append(i)  # noqa: E731
            end = lambda m, args, out, i=index: versions.update({i: _version(out)})  # noqa: E731
            handles += [module.register_forward_hook(start, prepend=True), module.register_forward_hook(end)]
        try:
            features = self._run(image)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for i, name in enumerate(self.stage_names) if i not in order]
        if missing:
            raise InputError(f"stages {missing} do not run before stage {self.stage_names[-1]!r} ends")
        if order != list(range(len(self.stage_names))):
            ran = [self.stage_names[i] for i in order]
            raise InputError(f"stages must be named in the order they run, and run once each; they ran as {ran}")
        for index, (name, feature) in enumerate(zip(self.stage_names, features, strict=True)):
            if feature.ndim != 4:
                raise InputError(f"stage {name!r} must return a map N×C×H×W, found shape {tuple(feature.shape)}")
            if feature._version > versions.get(index, feature._version):
                raise InputError(
                    f"the output of stage {name!r} is overwritten in place by the next layer; "
                    "end the stage at that layer instead"
                )
        return features

    def _drop_tail(self, ran: Sequence[nn.Module], image: Tensor) -> None:
        """Replace by identities all modules with parameters that no feature map depends on.

        Modules without any stay: they cost nothing, and code may read their settings without calling them.
        """
        needed = {id(m) for m in ran}
        params = [p for p in self.net.parameters() if p.is_floating_point()]
        frozen = [p for p in params if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            with evaluating(self.net), torch.enable_grad():
                total = sum((f.sum() for f in self(image)), torch.zeros(()))
                grads = torch.autograd.grad(total, params, allow_unused=True) if total.requires_grad else ()
        finally:
            for p in frozen:
                p.requires_grad_(False)
        needed |= {id(p) for p, g in zip(params, grads, strict=False) if g is not None}

        def prune(parent: nn.Module) -> None:
            for name, child in parent.named_children():
                used = any(id(part) in needed for part in (*child.modules(), *child.parameters()))
                if used:
                    prune(child)
                elif any(True for _ in child.parameters()):
                    setattr(parent, name, nn.Identity())

        prune(self.net)

    def _runs_to_the_end(self, image: Tensor) -> bool:
        """Whether the network's own code still works without its tail; exporters prefer that to leaving early."""
        self._leaves_early = False
        try:
            self._measure(image)
        except Exception:  # the user's code decides what it raises; leaving early skips it
            return False
        return True

    def _undo_downsampling(self, ran: Sequence[nn.Module]) -> None:
        """Give strided leaf modules stride 1: convolutions keep their weights, pooling goes."""
        strided = [m for m in ran if not list(m.children()) and _stride(m) > 1]
        for name, module in list(self.net.named_modules(remove_duplicate=False)):
            if module not in strided:
                continue
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if not isinstance(module.padding, str):
                    full = tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
                    if tuple(2 * p for p in module.padding) != full:
                        module.padding = "same"
            elif not list(module.parameters()):
                self.net.set_submodule(name, nn.Identity())


_thread = threading.local()
"""`pass_`: the maps that this thread's forward pass has collected, and whether they are those before denoising."""


class _StageEnd:
    """Forward hook: inserted the denoising layer and collects the stage's feature map.

    An object rather than a closure, so that a copied backbone's hooks point to the copy.
    """

    def __init__(self, backbone: Backbone, index: int) -> None:
        self.backbone = backbone
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        feature, rebuild = _joined(output, self.backbone.stage_names[self.index], self.backbone.layout)
        features, raw = _thread.pass_
        if raw:
            features.append(feature)
        if str(self.index) in self.backbone.inserted:
            feature = self.backbone.inserted[str(self.index)](feature)
            output = rebuild(feature)
        if not raw:
            features.append(feature)
        if self.backbone._leaves_early and self.index == len(self.backbone.stage_names) - 1:
            raise _LastStageReached
        return output


class _LastStageReached(Exception):
    """Leaves a network whose remaining code cannot run without its classifier."""


def _joined(output: Any, name: str, layout: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A stage's output as one map, and how to turn such a map back into the module's own output.

    Dual-path networks pass (residual, dense) pairs of one size between stages: channels of one map.
    """
    if isinstance(output, Tensor) and layout == "NHWC" and output.ndim == 4:
        return output.permute(0, 3, 1, 2), lambda feature: feature.permute(0, 2, 3, 1)
    if isinstance(output, Tensor):
        return output, lambda feature: feature
    maps = output if isinstance(output, (tuple, list)) else ()
    if all(isinstance(m, Tensor) and m.ndim == 4 for m in maps) and len({m.shape[-2:] for m in maps}) == 1:
        sizes = [m.shape[1] for m in maps]
        return torch.cat(list(maps), dim=1), lambda feature: type(output)(feature.split(sizes, dim=1))
    raise InputError(f"stage {name!r} must return a map N×C×H×W, found {_describe(output)}")


def _version(output: Any) -> int:
    """How often a tensor was changed in place; a tuple's map is a copy and cannot be."""
    return output._version if isinstance(output, Tensor) else 0


def _describe(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {', '.join(map(_describe, output))}"
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, (tuple, list)) else stride if isinstance(stride, int) else 1
