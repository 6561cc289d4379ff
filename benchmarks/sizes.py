"""Sizes of all workloads: the full benchmark, and a smoke run that only shows that everything runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkSize:
    """A backbone and the shape of its input batch."""

    backbone: str
    size: int
    """Height and width of the images."""
    batch: int
    channels: int = 3
    pyramid_channels: int | None = None
    step_bar: float = 4.5
    """Upper bar for the time of a two-phase step over that of a baseline step."""

    @property
    def name(self) -> str:
        """Backbone and image size, `resnet18@64`."""
        return f"{self.backbone}@{self.size}"


MINI = NetworkSize("resnet_mini", 28, 64, channels=1, pyramid_channels=16, step_bar=5.5)
"""As in the recipe mnist/mini."""


@dataclass(frozen=True)
class BenchmarkSizes:
    """Sizes of all workloads."""

    networks: tuple[NetworkSize, ...]
    matmul: int
    """Rows and columns of the square matrices whose product measures the device's peak."""
    batches: tuple[int, ...]
    """Images per attacked batch."""
    steps: int
    apgd_steps: int
    suite: str
    suite_images: int
    queries: int
    """Queries of the Square attack per image, in the libraries' suite."""
    scaling_suite: str
    scaling_images: int
    trained: tuple[str, ...] = ("mnist/mini-baseline", "digits/mini-fpd")
    """Networks to attack; the first whose data set is available is used."""
    smoke: bool = False
    """True where the sizes are too small for the numbers to mean anything."""


FULL = BenchmarkSizes(
    networks=(
        MINI, NetworkSize("resnet18", 64, 64), NetworkSize("resnet50", 64, 64), NetworkSize("resnet101", 64, 32),
        NetworkSize("resnet50", 224, 4),
    ),
    matmul=2048, batches=(16, 64, 128, 512), steps=40, apgd_steps=100, suite="standard", suite_images=200,
    queries=5000, scaling_suite="quick", scaling_images=256,
)  # fmt: skip
SMOKE = BenchmarkSizes(
    networks=(NetworkSize("resnet_mini", 8, 4, channels=1, pyramid_channels=4, step_bar=5.5),),
    matmul=64, batches=(4, 8), steps=3, apgd_steps=4, suite="first-look", suite_images=8,
    queries=4, scaling_suite="first-look", scaling_images=4, smoke=True,
)  # fmt: skip
