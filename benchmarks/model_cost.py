"""The FPD relative to its baseline: inference, training steps, precision, fraction of the matmul peak, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peak_memory
from benchmarks.results import Bar, ImplementationResult, Measure, Quartiles, Workload
from benchmarks.sizes import BenchmarkSizes, NetworkSize
from benchmarks.timing import Implementation, RoundLimits, Timing, interleave, quartiles, synchronizer
from benchmarks.training_step import JOINT, OPEN, VARIANTS, TrainableNetwork
from robustfpd.device import evaluating, supports_bf16
from robustfpd.rng import generator

BASELINE, TWO_PHASE, JOINED, BF16 = "baseline", "FPD", "FPD, joint", "FPD, bf16"
INFERENCE_BAR, MEMORY_BAR, JOINT_BAR, PRECISION_BAR = 2.2, 2.4, 1.0, 1.7
MATMUL = "matmul"


def model_workloads(sizes: BenchmarkSizes, limits: RoundLimits, device: torch.device) -> Iterator[Workload]:
    """Yield the workloads of each network."""
    for size in sizes.networks:
        baseline, fpd = TrainableNetwork(size, "none", device), TrainableNetwork(size, "fpd", device)
        yield training_step(size, baseline, fpd, sizes.matmul, limits)
        yield inference(size, baseline, fpd, limits)
        del baseline, fpd
        yield memory(size, device)


def training_step(
    size: NetworkSize, baseline: TrainableNetwork, fpd: TrainableNetwork, side: int, limits: RoundLimits
) -> Workload:
    """Time training steps in turns with a large matmul, which measures the device's peak."""
    device = baseline.images.device
    bf16 = supports_bf16(device)
    implementations = [
        Implementation(BASELINE, baseline.step),
        Implementation(TWO_PHASE, fpd.step),
        Implementation(JOINED, lambda: fpd.step(JOINT)),
        Implementation(f"{MATMUL}, fp32", matmul(side, torch.float32, device)),
    ]
    if bf16:
        implementations += [
            Implementation(BF16, lambda: fpd.step(OPEN, torch.bfloat16)),
            Implementation(f"{MATMUL}, bf16", matmul(side, torch.bfloat16, device)),
        ]
    timing = interleave(implementations, limits, synchronize=synchronizer(device))
    assert timing.returned[TWO_PHASE].second is not None, "the gate was shut"
    with FlopCounterMode(display=False) as counter:
        fpd.step()
    relative_work = counter.get_total_flops() / (2 * side**3)
    step_bar = Bar(at_most=size.step_bar)
    measures = [
        Measure(what="two-phase step / baseline step", value=timing.ratio(TWO_PHASE, BASELINE), bar=step_bar),
        Measure(what="joint step / baseline step", value=timing.ratio(JOINED, BASELINE), bar=step_bar),
        Measure(what="joint step / two-phase step", value=timing.ratio(JOINED, TWO_PHASE), bar=Bar(at_most=JOINT_BAR)),
        _peak_fraction(timing, TWO_PHASE, "fp32", relative_work),
    ]
    if bf16:
        speedup = timing.ratio(TWO_PHASE, BF16)
        measures += [
            Measure(what="fp32 step / bf16 step", value=speedup, bar=Bar(at_least=PRECISION_BAR)),
            _peak_fraction(timing, BF16, "bf16", relative_work),
        ]
    notes = () if bf16 else ("this machine has no bfloat16 instructions: the bf16 step was not measured",)
    return _workload(size, "training step", timing, measures, notes)


def inference(
    size: NetworkSize, baseline: TrainableNetwork, fpd: TrainableNetwork, limits: RoundLimits
) -> Workload:  # fmt: skip
    """Time the classification of one batch."""
    baseline.calibrate_batch_norms()
    fpd.calibrate_batch_norms()
    with torch.inference_mode(), evaluating(baseline.module), evaluating(fpd.module):
        implementations = [
            Implementation(name, partial(network.module.classifier(), network.images))
            for name, network in ((BASELINE, baseline), (TWO_PHASE, fpd))
        ]
        timing = interleave(implementations, limits, synchronize=synchronizer(baseline.images.device))
    ratio = timing.ratio(TWO_PHASE, BASELINE)
    return _workload(
        size, "inference", timing, [Measure(what="FPD / baseline", value=ratio, bar=Bar(at_most=INFERENCE_BAR))]
    )


def memory(size: NetworkSize, device: torch.device) -> Workload:
    """Measure the peak memory of training steps."""
    found = {name: peak_memory.measure(size, name, device) for name in VARIANTS}

    def ratio(name: str, field: str) -> Quartiles:
        return quartiles([getattr(found[name], field) / max(1, getattr(found["baseline"], field))])

    bar = Bar(at_most=MEMORY_BAR)
    measures = (
        Measure(what="two-phase step / baseline step", value=ratio("two-phase", "peak"), bar=bar),
        Measure(what="joint step / baseline step", value=ratio("joint", "peak"), bar=bar),
        Measure(what="the same without weights, two-phase step", value=ratio("two-phase", "growth")),
    )
    notes = tuple(f"{name}: peak {m.peak} bytes, of it {m.growth} above the weights" for name, m in found.items())
    return Workload(group=size.name, variant="peak memory", measures=measures, notes=notes)


def matmul(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that multiplies two square matrices."""
    draws = generator(0, "matmul")
    a, b = (torch.rand(size, size, generator=draws).to(device, dtype) for _ in range(2))
    return lambda: a @ b


def _peak_fraction(timing: Timing, name: str, precision: str, relative_work: float) -> Measure:
    """A step's operations per second over the matmul's; `relative_work` is the ratio of their operations."""
    value = timing.ratio(f"{MATMUL}, {precision}", name, scale=relative_work)
    return Measure(what=f"two-phase step, {precision}: fraction of the matmul peak", value=value, unit="%")


def _workload(
    size: NetworkSize, variant: str, timing: Timing, measures: list[Measure], notes: tuple[str, ...] = ()
) -> Workload:
    entries = tuple(
        ImplementationResult(name=name, seconds=timing.quartiles(name), ratio=timing.ratio(name, BASELINE))
        for name in timing.seconds
    )
    return Workload(
        group=size.name, variant=f"{variant}, batch {size.batch}", reference=BASELINE, entries=entries,
        measures=tuple(measures), notes=notes,
    )  # fmt: skip
