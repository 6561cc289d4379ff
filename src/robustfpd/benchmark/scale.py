"""How much is measured: everything, or next to nothing, to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A backbone, and the images it is measured on."""

    backbone: str
    size: int
    batch: int
    channels: int = 3
    pyramid_channels: int | None = None
    step_bar: float = 4.5
    """How many plain steps a two-phase step may cost."""

    @property
    def name(self) -> str:
        """Backbone, and side of the images."""
        return f"{self.backbone}@{self.size}"


MINI = Network("resnet_mini", 28, 64, channels=1, pyramid_channels=16, step_bar=5.5)
"""As the recipe mnist/mini has it."""


@dataclass(frozen=True)
class Scale:
    """Sizes of all workloads."""

    networks: tuple[Network, ...]
    matmul: int
    """Rows and columns of the matrices whose product tells the machine's peak."""
    batches: tuple[int, ...]
    """Images attacked at a time."""
    steps: int
    apgd_steps: int
    suite: str
    suite_images: int
    queries: int
    """Square's, per image, in the suite of libraries."""
    scaling_suite: str
    scaling_images: int
    trained: tuple[str, ...] = ("mnist/mini-baseline", "digits/mini-fpd")
    """Networks to attack; the first whose images are there is."""
    smoke: bool = False
    """Too little for its numbers to mean anything."""


FULL = Scale(
    networks=(
        MINI, Network("resnet18", 64, 64), Network("resnet50", 64, 64), Network("resnet101", 64, 32),
        Network("resnet50", 224, 4),
    ),
    matmul=2048, batches=(16, 64, 128, 512), steps=40, apgd_steps=100, suite="standard", suite_images=200,
    queries=5000, scaling_suite="quick", scaling_images=256,
)  # fmt: skip
SMOKE = Scale(
    networks=(Network("resnet_mini", 8, 4, channels=1, pyramid_channels=4, step_bar=5.5),),
    matmul=64, batches=(4, 8), steps=3, apgd_steps=4, suite="first-look", suite_images=8,
    queries=4, scaling_suite="first-look", scaling_images=4, smoke=True,
)  # fmt: skip
