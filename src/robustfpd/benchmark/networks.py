"""FPD against its undefended baseline: inference, training steps, precision, share of the matmul peak, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustfpd.benchmark import memory
from robustfpd.benchmark.machine import synchroniser
from robustfpd.benchmark.result import Bar, Entry, Measure, Workload
from robustfpd.benchmark.scale import Network, Scale
from robustfpd.benchmark.timing import Contender, Pace, Timing, interleave
from robustfpd.config import ModelConfig, TaskConfig, TrainingConfig
from robustfpd.models import FPD, build
from robustfpd.models.mode import evaluating
from robustfpd.models.precision import multiplies_bf16
from robustfpd.rng import generator
from robustfpd.training.optim import make_optimizer
from robustfpd.training.stepping import Stepper
from robustfpd.training.steps import StepResult, baseline_step, parameter_groups, two_phase_step

OPEN = TrainingConfig.model_validate({"threshold": 1e30, "optimizer": {"name": "adam", "lr": 1e-4}})
"""The gate always open: both phases run in every step."""
JOINT = OPEN.model_copy(update={"second_pass": "joint"})
PLAIN, DETACHED, JOINED, BF16 = "plain", "FPD", "FPD, joint", "FPD, bf16"
INFERENCE_BAR, MEMORY_BAR, JOINT_BAR, PRECISION_BAR = 2.2, 2.4, 1.0, 1.7
MATMUL = "matmul"


class Trainee:
    """A network with its optimiser, and one batch that it is trained on again and again."""

    def __init__(self, network: Network, defence: str, device: torch.device) -> None:
        task = TaskConfig.model_validate(
            {"num_classes": 10, "in_channels": network.channels, "image_size": network.size}
        )
        config = ModelConfig(backbone=network.backbone, pyramid_channels=network.pyramid_channels)
        fabric = Fabric(accelerator=device.type, devices=1 if device.index is None else [device.index])
        self.raw = build(task, config if defence == "fpd" else config.baseline())
        self.model, optimizer = fabric.setup(self.raw, make_optimizer(parameter_groups(self.raw), OPEN.optimizer))
        self.update = Stepper(fabric, self.model, optimizer, OPEN.clip_grad_norm)
        self.images, self.noisy, self.labels = (t.to(device) for t in batch(network))

    def step(self, config: TrainingConfig = OPEN, dtype: torch.dtype = torch.float32) -> StepResult:
        """Train on the batch once, as real training does."""
        step = two_phase_step(config) if isinstance(self.raw, FPD) else baseline_step(config)
        with torch.autocast(self.images.device.type, dtype, enabled=dtype != torch.float32):
            return step(self.model, self.images, self.noisy, self.labels, self.update)


def batch(network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Random images N×C×H×W in [0, 1], the same with noise, and labels N."""
    draws, shape = generator(0, "benchmark"), (network.batch, network.channels, network.size, network.size)
    images = torch.rand(shape, generator=draws)
    noisy = images + OPEN.noise * (2 * torch.rand(shape, generator=draws) - 1)
    return images, noisy, torch.randint(0, 10, (network.batch,), generator=draws)


def model_workloads(scale: Scale, pace: Pace, device: torch.device) -> Iterator[Workload]:
    """Measure every network."""
    for network in scale.networks:
        plain, fpd = Trainee(network, "none", device), Trainee(network, "fpd", device)
        yield training(network, plain, fpd, scale, pace)
        yield inference(network, plain, fpd, pace)
        del plain, fpd
        yield peak_memory(network, device)


def training(network: Network, plain: Trainee, fpd: Trainee, scale: Scale, pace: Pace) -> Workload:
    """Time training steps, with a large matmul among the contenders to tell what the machine can do."""
    device = plain.images.device
    contenders = [
        Contender(PLAIN, plain.step),
        Contender(DETACHED, fpd.step),
        Contender(JOINED, lambda: fpd.step(JOINT)),
        Contender(f"{MATMUL}, fp32", matmul(scale.matmul, torch.float32, device)),
    ]
    if multiplies_bf16(device):
        contenders += [
            Contender(BF16, lambda: fpd.step(OPEN, torch.bfloat16)),
            Contender(f"{MATMUL}, bf16", matmul(scale.matmul, torch.bfloat16, device)),
        ]
    timing = interleave(contenders, pace, synchronise=synchroniser(device))
    assert timing.returned[DETACHED].second_ce is not None, "the gate was shut"
    measures = [
        Measure(what="two-phase step / plain step", value=timing.ratio(DETACHED, PLAIN), bar=_most(network.step_bar)),
        Measure(what="joint step / plain step", value=timing.ratio(JOINED, PLAIN), bar=_most(network.step_bar)),
        Measure(what="joint step / two-phase step", value=timing.ratio(JOINED, DETACHED), bar=_most(JOINT_BAR)),
        share("two-phase step", fpd.step, DETACHED, "fp32", timing, scale),
    ]
    notes: tuple[str, ...] = ("no bfloat16 on this machine: its step was not measured",)
    if multiplies_bf16(device):
        notes = ()
        measures += [
            Measure(what="fp32 step / bf16 step", value=timing.ratio(DETACHED, BF16), bar=Bar(at_least=PRECISION_BAR)),
            share("two-phase step", fpd.step, BF16, "bf16", timing, scale),
        ]
    return _workload(network, "training step", timing, measures, notes)


def inference(network: Network, plain: Trainee, fpd: Trainee, pace: Pace) -> Workload:
    """Time classification of one batch."""
    settle(plain)
    settle(fpd)
    with torch.inference_mode(), evaluating(plain.raw), evaluating(fpd.raw):
        classifiers = {PLAIN: plain.raw.classifier(), DETACHED: fpd.raw.classifier()}
        contenders = [Contender(name, _classifying(c, plain.images)) for name, c in classifiers.items()]
        timing = interleave(contenders, pace, synchronise=synchroniser(plain.images.device))
    ratio = Measure(what="FPD / plain", value=timing.ratio(DETACHED, PLAIN), bar=_most(INFERENCE_BAR))
    return _workload(network, "inference", timing, [ratio])


def peak_memory(network: Network, device: torch.device) -> Workload:
    """Measure training steps in processes of their own."""
    found = {name: memory.measured(network, name, device) for name in ("plain", "detached", "joint")}

    def ratio(name: str, field: str) -> Any:
        one = getattr(found[name], field) / max(1, getattr(found["plain"], field))
        return {"median": one, "low": one, "high": one}

    measures = [
        Measure(what="two-phase step / plain step", value=ratio("detached", "peak"), bar=_most(MEMORY_BAR)),
        Measure(what="joint step / plain step", value=ratio("joint", "peak"), bar=_most(MEMORY_BAR)),
        Measure(what="the same without weights, two-phase step", value=ratio("detached", "growth")),
    ]
    notes = tuple(f"{name}: peak {m.peak} bytes, of it {m.growth} above the weights" for name, m in found.items())
    return Workload(group=network.name, variant="peak memory", measures=tuple(measures), notes=notes)


def matmul(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Product of two square matrices."""
    draws = generator(0, "matmul")
    a, b = (torch.rand(size, size, generator=draws).to(device, dtype) for _ in range(2))
    return lambda: a @ b


def share(
    what: str, step: Callable[[], Any], name: str, precision: str, timing: Timing, scale: Scale
) -> Measure:  # fmt: skip
    """A step's operations per second over the matmul's, round by round."""
    with FlopCounterMode(display=False) as counter:
        step()
    each = counter.get_total_flops() / (2 * scale.matmul**3)
    value = timing.ratio(f"{MATMUL}, {precision}", name, scale=each)
    return Measure(what=f"{what}, {precision}: share of the matmul peak", value=value, unit="%")


def settle(trainee: Trainee) -> None:
    """Let batch norms see the batch: with the statistics they begin with, denoising overflows."""
    norms = [m for m in trainee.raw.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean of all that they see
    trainee.raw.train()
    with torch.no_grad():
        trainee.raw(trainee.images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def _classifying(classifier: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    return lambda: classifier(images)


def _workload(
    network: Network, variant: str, timing: Timing, measures: list[Measure], notes: tuple[str, ...] = ()
) -> Workload:  # fmt: skip
    entries = tuple(
        Entry(name=name, seconds=timing.spread(name), ratio=timing.ratio(name, PLAIN)) for name in timing.seconds
    )
    return Workload(
        group=network.name, variant=f"{variant}, batch {network.batch}", reference=PLAIN, entries=entries,
        measures=tuple(measures), notes=notes,
    )  # fmt: skip


def _most(limit: float) -> Bar:
    return Bar(at_most=limit)
