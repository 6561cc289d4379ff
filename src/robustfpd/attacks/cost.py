"""What attacks cost at most: passes of one image that stands until the end, from the attack's options.

Most evaluations take a fraction of it, because images fall and leave.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from robustfpd.attacks import get
from robustfpd.attacks.apgd_schedule import SHRINKING
from robustfpd.attacks.autoattack import EOT_SAMPLES
from robustfpd.config import Norm

SETTLING = 8
"""Looks at an image before a library's search, and at what it found after it."""


@dataclass(frozen=True)
class Passes:
    """Images that go through a network."""

    forward: int
    backward: int
    """Of these, images whose gradient is asked for."""

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> Passes:
        return Passes(self.forward * count, self.backward * count)


@dataclass(frozen=True)
class Victim:
    """What the cost of an attack depends on beside its options."""

    norm: Norm
    classes: int
    pixels: int
    """Values of an image: channels × height × width."""


def most(name: str, victim: Victim, options: Mapping[str, Any]) -> Passes:
    """Passes of one image that withstands the attack `name` with `options`, never fewer than it takes."""
    signature = inspect.signature(get(name).function)
    defaults = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    return _COSTS[name](victim, {**defaults, **options})


_Cost = Callable[[Victim, Mapping[str, Any]], Passes]


def _ascent(victim: Victim, o: Mapping[str, Any]) -> Passes:
    """Where batches are refilled, an image's last look may share a batch with others' steps, and their way back."""
    restarts, steps = o.get("restarts", 1), o.get("steps", 1)
    refilled = "batch_size" in o and (restarts > 1 or o["early_stop"] or o["batch_size"] is not None)
    return Passes(restarts * (steps + 1), restarts * (steps + refilled))


def _apgd(victim: Victim, o: Mapping[str, Any]) -> Passes:
    starts = len(SHRINKING) if victim.norm == "l1" else 1  # in L1 each radius looks once more
    runs = o["restarts"] * min(o.get("targets", 1), victim.classes - 1)
    looks = runs * (o["steps"] + starts) * o["eot"]
    return Passes(1 + looks, looks)


def _fab(victim: Victim, o: Mapping[str, Any]) -> Passes:
    """Two looks at each linearisation; untargeted, a gradient for every class."""
    targeted = "targets" in o
    runs = o["restarts"] * (min(o["targets"], victim.classes - 1) if targeted else 1)
    gradients = runs * o["steps"] * (1 if targeted else victim.classes)
    return Passes(SETTLING + runs * 2 * (o["steps"] + 1), gradients)


def _deepfool(victim: Victim, o: Mapping[str, Any]) -> Passes:
    looks = o["steps"] * max(min(o["candidates"] or victim.classes, victim.classes) - 1, 1)
    return Passes(SETTLING + looks, looks)


def _minimal(victim: Victim, o: Mapping[str, Any]) -> Passes:
    return Passes(SETTLING + o["steps"], o["steps"])


def _cw(victim: Victim, o: Mapping[str, Any]) -> Passes:
    """L∞: for every limit and constant, Adam with a loss and two gradients by class at each step, and two losses."""
    if victim.norm == "l2":
        looks = (o["steps"] or 200) * o["binary_search_steps"]
        return Passes(SETTLING + looks, looks)
    limits = math.ceil(math.log(256) / -math.log(o["decrease_factor"])) + 1
    constants = math.floor(math.log10(max(o["largest_const"] / o["initial_const"], 1))) + 1
    searches, steps = limits * constants, o["steps"] or 100
    return Passes(SETTLING + searches * (4 * steps + 4), searches * 2 * (steps + 1))


def _jsma(victim: Victim, o: Mapping[str, Any]) -> Passes:
    """Two of twice the pixels move by theta at a time, each until it has gone all the way, at most gamma of them."""
    moves = math.ceil(1 / o["theta"]) * (math.ceil(victim.pixels * o["gamma"]) + 2) // 2 + 1
    targets = min(o["targets"], victim.classes - 1)
    return Passes(SETTLING + 12 + targets * (2 * moves + 1), targets * moves)


def _zoo(victim: Victim, o: Mapping[str, Any]) -> Passes:
    steps = o["binary_search_steps"] * o["steps"]
    return Passes(SETTLING + (steps + 1) * (2 * min(o["coordinates"], victim.pixels) + 1), 0)


def _queries(victim: Victim, o: Mapping[str, Any]) -> Passes:
    return Passes(SETTLING + o["queries"] * o.get("restarts", 1), 0)


def _noise(victim: Victim, o: Mapping[str, Any]) -> Passes:
    return Passes(o["samples"], 0)


def _autoattack(victim: Victim, o: Mapping[str, Any]) -> Passes:
    first, targets = (5, 5) if victim.norm == "l1" else (1, 9)
    return _sum(victim, {"apgd-ce": {"restarts": first}, "apgd-t": {"targets": targets}, "fab-t": {}, "square": {}})


def _autoattack_rand(victim: Victim, o: Mapping[str, Any]) -> Passes:
    return _sum(victim, {"apgd-ce": {"eot": EOT_SAMPLES}, "apgd-dlr": {"eot": EOT_SAMPLES}})


def _sum(victim: Victim, members: Mapping[str, Mapping[str, Any]]) -> Passes:
    """Each member's passes, and a look at what it found."""
    total = Passes(0, 0)
    for name, options in members.items():
        total += most(name, victim, options) + Passes(1, 0)
    return total


_COSTS: dict[str, _Cost] = {
    "apgd-ce": _apgd, "apgd-dlr": _apgd, "apgd-t": _apgd, "autoattack": _autoattack,
    "autoattack-rand": _autoattack_rand, "bim": _ascent, "cw": _cw, "ddn": _minimal, "deepfool": _deepfool,
    "fab": _fab, "fab-t": _fab, "fgsm": _ascent, "fmn": _minimal, "hopskipjump": _queries, "jsma": _jsma,
    "noise": _noise, "pgd": _ascent, "square": _queries, "zoo": _zoo,
}  # fmt: skip
