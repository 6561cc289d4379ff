"""The FPD relative to its baseline: inference, training steps, precision, fraction of the matmul peak, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peak_memory
from benchmarks.results import Bar, ImplementationResult, Measure, Quartiles, Workload
from benchmarks.sizes import BenchmarkSizes, NetworkSize
from benchmarks.timing import Implementation, RoundLimits, Timing, interleave, quartiles, synchronizer
from benchmarks.training_step import Kind, TrainableNetwork
from robustfpd.device import evaluating, supports_bf16
from robustfpd.rng import generator

BASELINE: Kind = "baseline"
IMPROVED: Kind = "improved"
FULL_FRONT: Kind = "improved, full front"
CORRECTED: Kind = "corrected"
JOINT: Kind = "corrected, joint"
PHASE_ONE, BF16 = "improved, phase 1 alone", "improved, bf16"
INFERENCE_BARS = {IMPROVED: 1.5, FULL_FRONT: 2.2}
STEP_BAR, MEMORY_BAR, PRECISION_BAR = 2.5, 2.4, 1.7
MATMUL = "matmul"


def model_workloads(sizes: BenchmarkSizes, limits: RoundLimits, device: torch.device) -> Iterator[Workload]:
    """Yield the workloads of each network."""
    for size in sizes.networks:
        kinds: tuple[Kind, ...] = (BASELINE, IMPROVED, FULL_FRONT, CORRECTED, JOINT)
        networks = {kind: TrainableNetwork(size, kind, device) for kind in kinds}
        yield training_step(size, networks, sizes.matmul, limits)
        yield inference(size, networks, limits)
        del networks
        yield memory(size, device)


def training_step(
    size: NetworkSize, networks: dict[Kind, TrainableNetwork], side: int, limits: RoundLimits
) -> Workload:  # fmt: skip
    """Time training steps in turns with a large matmul, which measures the device's peak."""
    improved, device = networks[IMPROVED], networks[IMPROVED].images.device
    bf16 = supports_bf16(device)
    implementations = [
        *(Implementation(kind, network.step) for kind, network in networks.items()),
        Implementation(PHASE_ONE, lambda: improved.step(index=1)),
        Implementation(f"{MATMUL}, fp32", matmul(side, torch.float32, device)),
    ]
    if bf16:
        implementations += [
            Implementation(BF16, lambda: improved.step(dtype=torch.bfloat16)),
            Implementation(f"{MATMUL}, bf16", matmul(side, torch.bfloat16, device)),
        ]
    timing = interleave(implementations, limits, synchronize=synchronizer(device))
    assert timing.returned[IMPROVED].second is not None, "the gate was shut"
    with FlopCounterMode(display=False) as counter:
        improved.step()
    relative_work = counter.get_total_flops() / (2 * side**3)
    interval = improved.config.second_pass_interval
    mean = [
        (both + (interval - 1) * one) / interval
        for both, one in zip(timing.seconds[IMPROVED], timing.seconds[PHASE_ONE], strict=True)
    ]
    with_mean = Timing({**timing.seconds, "mean": mean}, timing.returned)
    measures = [
        Measure(
            what=f"improved, mean step (phase 2 in one of {interval} batches) / baseline step",
            value=with_mean.ratio("mean", BASELINE), bar=Bar(at_most=STEP_BAR),
        ),
        Measure(what="improved, step with both phases / baseline step", value=timing.ratio(IMPROVED, BASELINE)),
        Measure(
            what="corrected, two-phase step / baseline step", value=timing.ratio(CORRECTED, BASELINE),
            bar=Bar(at_most=size.step_bar),
        ),
        Measure(what="corrected, joint step / two-phase step", value=timing.ratio(JOINT, CORRECTED)),
        _peak_fraction(timing, IMPROVED, "fp32", relative_work),
    ]  # fmt: skip
    if bf16:
        speedup = timing.ratio(IMPROVED, BF16)
        measures += [
            Measure(what="improved, fp32 step / bf16 step", value=speedup, bar=Bar(at_least=PRECISION_BAR)),
            _peak_fraction(timing, BF16, "bf16", relative_work),
        ]
    notes = () if bf16 else ("this machine has no bfloat16 instructions: the bf16 step was not measured",)
    return _workload(size, "training step", timing, measures, notes)


def inference(size: NetworkSize, networks: dict[Kind, TrainableNetwork], limits: RoundLimits) -> Workload:
    """Time the classification of one batch."""
    kinds: tuple[Kind, ...] = (BASELINE, IMPROVED, FULL_FRONT, CORRECTED)
    modules = {kind: networks[kind].module for kind in kinds}
    for kind in kinds:
        networks[kind].calibrate_batch_norms()
    images = networks[BASELINE].images
    modes = [evaluating(module) for module in modules.values()]
    with torch.inference_mode(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        implementations = [
            Implementation(kind, partial(module.classifier(), images)) for kind, module in modules.items()
        ]
        timing = interleave(implementations, limits, synchronize=synchronizer(images.device))
    measures = [
        Measure(
            what=f"{kind} / baseline", value=timing.ratio(kind, BASELINE),
            bar=Bar(at_most=INFERENCE_BARS[kind]) if kind in INFERENCE_BARS else None,
        )
        for kind in kinds[1:]
    ]  # fmt: skip
    return _workload(size, "inference", timing, measures)


def memory(size: NetworkSize, device: torch.device) -> Workload:
    """Measure the peak memory of training steps."""
    kinds: tuple[Kind, ...] = (BASELINE, IMPROVED, CORRECTED, JOINT)
    found = {kind: peak_memory.measure(size, kind, device) for kind in kinds}

    def ratio(kind: Kind, field: str) -> Quartiles:
        return quartiles([getattr(found[kind], field) / max(1, getattr(found[BASELINE], field))])

    bar = Bar(at_most=MEMORY_BAR)
    measures = (
        *(Measure(what=f"{kind} step / baseline step", value=ratio(kind, "peak"), bar=bar) for kind in kinds[1:]),
        Measure(what="the same without weights, improved step", value=ratio(IMPROVED, "growth")),
    )
    notes = tuple(f"{kind}: peak {m.peak} bytes, of it {m.growth} above the weights" for kind, m in found.items())
    return Workload(group=size.name, variant="peak memory", measures=measures, notes=notes)


def matmul(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that multiplies two square matrices."""
    draws = generator(0, "matmul")
    a, b = (torch.rand(size, size, generator=draws).to(device, dtype) for _ in range(2))
    return lambda: a @ b


def _peak_fraction(timing: Timing, name: str, precision: str, relative_work: float) -> Measure:
    """A step's operations per second over the matmul's; `relative_work` is the ratio of their operations."""
    value = timing.ratio(f"{MATMUL}, {precision}", name, scale=relative_work)
    return Measure(what=f"improved, both phases, {precision}: fraction of the matmul peak", value=value, unit="%")


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
