"""Export a network to one file that runs without robustfpd: ONNX, or a program of torch.export.

The written file is read again and compared with the network before it replaces an older one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

from robustfpd.errors import InputError, first_line
from robustfpd.io import write_bytes
from robustfpd.models.fpd import FPD, Baseline
from robustfpd.provenance import weights_sha256
from robustfpd.rng import generator

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4
"""Largest allowed difference between file and network, relative to the largest output and at least to 1."""

Runner = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    path: Path
    outputs: tuple[str, ...]
    """`logits`, and `restored` on request."""
    image_size: tuple[int, int]
    """Height and width of its images; the batch may have any size."""
    difference: float
    """Largest absolute difference between the outputs of file and network."""
    compared: int
    """Number of images that were compared."""
    facts: dict[str, str]
    """The file's metadata."""


def export(
    model: FPD | Baseline,
    path: str | Path,
    *,
    format: Format = "onnx",
    restored: bool = False,
    image_size: tuple[int, int] | None = None,
    class_names: Sequence[str] = (),
) -> Exported:
    """Write a network to one file: `images` N×C×H×W float32 in [0, 1] → `logits` N×K, for any N.

    Args:
        model: an FPD or its baseline, which does not change. Evaluation mode is exported, with the head's squashing.
        path: file to write; an existing one is replaced once the new one is verified.
        format: `onnx`, or `torch`: a program of torch.export, which `torch.export.load(path).module()` runs.
        restored: return the restored images, N×C×H×W, as a second output.
        image_size: height and width; None takes those of `model.task`.
        class_names: K names for the file's metadata.

    Raises:
        InputError: a missing package, images that the network does not take, `restored` without a decoder, or a file
            whose outputs differ from the network's; then nothing is written.
    """
    path, size = Path(path), image_size or model.task.image_size
    if format not in SUFFIXES:
        raise InputError(f"format must be onnx or torch, found {format!r}")
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"exporting to ONNX needs {', '.join(missing)}; install with: pip install 'robustfpd[export]'")
    if restored and not isinstance(model, FPD):
        raise InputError("a baseline has no restoration; export it without restored")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file to export to")
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not home.is_dir():
        raise InputError(f"{home} is a file, so there can be no {path}; give a file in a folder")
    module = _Exportable(_plain_copy(model), restored)
    # Another copy than the exported one, whose errors would be in both.
    reference = _Exportable(copy.deepcopy(model).cpu().eval(), restored)
    outputs = ("logits", "restored") if restored else ("logits",)
    facts = _facts(model, size, class_names, outputs)
    # Each export has its own folder, beside the target, where an unwritable folder fails before the export.
    with tempfile.TemporaryDirectory(prefix=".robustfpd-", dir=home) as folder, _exporters_silenced():
        exported = Path(folder) / path.name
        program = _traced(module, size)
        if format == "onnx":
            _write_onnx(program, exported, outputs, facts)
            run = _onnx_runner(exported)
        else:
            _write_program(program, exported, facts)
            run = _program_runner(exported)
        difference, compared = _compare(reference, run, size)
        write_bytes(path, exported.read_bytes(), concurrent=True)
    return Exported(path, outputs, size, difference, compared, facts)


class _Exportable(nn.Module):
    """A network with a plain tuple of outputs: (logits,) or (logits, restored)."""

    def __init__(self, model: FPD | Baseline, restored: bool) -> None:
        super().__init__()
        self.model = model
        self.restored = restored

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out = self.model(images)
        if isinstance(out, Tensor):
            return (out,)
        return (out.logits, out.restored) if self.restored else (out.logits,)


def _plain_copy(model: FPD | Baseline) -> FPD | Baseline:
    """Copy to the CPU, in evaluation mode, with constrained weights as plain parameters."""
    plain = copy.deepcopy(model).cpu().eval()
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            kind = type(module)  # the original shares this class, which removing a parametrization changes: copy it
            module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return plain


def _facts(
    model: FPD | Baseline, size: tuple[int, int], names: Sequence[str], outputs: Sequence[str]
) -> dict[str, str]:
    """Return the file's metadata."""
    shape = f"N×{model.task.in_channels}×{size[0]}×{size[1]}"
    colours = {1: ", grey", 3: ", RGB"}.get(model.task.in_channels, "")
    squashed = ", squashed by tanh into (-1, 1)" if model.head.squashes else ""
    facts = {
        "robustfpd": version("robustfpd"),
        "images": f"{shape} float32 in [0, 1]{colours}; mean and std are applied inside",
        "logits": f"N×{model.task.num_classes}{squashed}",
        "weights_sha256": weights_sha256(model.classifier()) or "",  # as in evaluation records
        "class_names": json.dumps(list(names), ensure_ascii=False),
    }
    if "restored" in outputs:
        facts["restored"] = f"{shape}, near [0, 1], not clamped"
    return facts


def _traced(module: _Exportable, size: tuple[int, int]) -> ExportedProgram:
    """Return the network's operations, for any number of images.

    Non-strict export runs the network's Python: the backbone's hooks collect maps in objects that strict tracing does
    not see.
    """
    images = torch.rand(2, module.model.task.in_channels, *size)
    batch = torch.export.Dim("batch", min=1)
    traced: nn.Module = module
    try:
        with torch.no_grad():
            module(images)  # raises the network's own errors first
            backbone = module.model.backbone
            if backbone.leaves_early or backbone.front < len(backbone.stage_names):
                # The exporter loses track of modules that end by an exception; make_fx does not follow modules.
                tracer = make_fx(
                    lambda x: module(x), tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True
                )
                traced = tracer(images)
            return torch.export.export(traced, (images,), dynamic_shapes=({0: batch},), strict=False)
    except InputError:
        raise
    except Exception as error:  # code of the user's own backbone that cannot be traced
        raise InputError(
            f"the network cannot be exported: {type(error).__name__}: {first_line(error)}; its code must not decide by "
            "the values or the number of the images"
        ) from error


def _write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str], facts: dict[str, str]) -> None:
    import onnx

    try:
        converted = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=list(outputs), verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"the network cannot be converted to ONNX: {first_line(error.__cause__ or error)}") from error  # type: ignore[arg-type]
    assert converted is not None
    proto = converted.model_proto
    if proto.ByteSize() >= 2**31:
        raise InputError("one ONNX file holds at most 2 GB; export with format torch")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
        value.doc_string = facts[value.name]
    del proto.graph.value_info[:]  # inner shapes name the batch otherwise; runtimes infer them
    onnx.helper.set_model_props(proto, facts)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def _onnx_runner(path: Path) -> Runner:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def _write_program(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    program.example_inputs = None  # would be pickled; without them the file is JSON and raw weights
    with path.open("wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file, extra_files={"robustfpd.json": json.dumps(facts, ensure_ascii=False)})


def _program_runner(path: Path) -> Runner:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images: list(module(images))


@torch.no_grad()
def _compare(module: _Exportable, run: Runner, size: tuple[int, int]) -> tuple[float, int]:
    """Return the largest difference between file and network, and the number of compared images.

    Raises an InputError if the difference is too large.
    """
    largest, compared = 0.0, 0
    for images in _test_images(module.model.task.in_channels, size):
        for expected, found in zip(module(images), run(images), strict=True):
            if found.shape != expected.shape:
                raise InputError(f"the exported file gives {tuple(found.shape)}, the network {tuple(expected.shape)}")
            difference = float((found - expected).abs().max())
            allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
            if not difference <= allowed:  # NaN is not
                raise InputError(
                    f"the exported file differs from the network by {difference:.3g} for {len(images)} images, "
                    f"{allowed:.3g} is allowed; nothing was written"
                )
            largest = max(largest, difference)
        compared += len(images)
    return largest, compared


def _test_images(channels: int, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield batches of noise, of smooth images, which resemble photographs, and of a black and a white image."""
    rng = generator(0, "export")
    for count in (1, 2, 5):
        yield torch.rand(count, channels, *size, generator=rng)
        coarse = torch.rand(count, channels, 4, 4, generator=rng)
        yield F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    yield torch.cat([torch.zeros(1, channels, *size), torch.ones(1, channels, *size)])


@contextmanager
def _exporters_silenced() -> Iterator[None]:
    """Suppress warnings and log messages of the exporters."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
