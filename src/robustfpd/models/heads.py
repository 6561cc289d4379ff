"""FPD_LCC: Lipschitz-constrained classification layers.

Li et al., CVPR 2020, section 3.3; the spectral bound after Miyato et al., ICLR 2018, as an upper bound instead of an
equality.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustfpd.config import Head
from robustfpd.errors import unknown_name


class ClassificationLayer(nn.Module):
    """Features h, N×C → logits N×K, with a known Lipschitz constant in L2.

    Args:
        linear: `W h + b` with C inputs and K outputs.
        bound: Lipschitz constant that the layer enforces; None where it enforces none.
    """

    squashes = False
    """Whether `forward` applies a squashing function, which hides gradients where it saturates."""

    def __init__(self, linear: nn.Module, bound: float | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.bound = bound

    def pre_squash(self, features: Tensor) -> Tensor:
        """Return the logits N×K before squashing, which adaptive attacks differentiate."""
        out: Tensor = self.linear(features)
        return out

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits N×K of features N×C."""
        return self.pre_squash(features)

    def lipschitz(self) -> float:
        """Return an upper bound of |f(a) - f(b)|₂ / |a - b|₂: the enforced one, else the present spectral norm of W."""
        assert isinstance(self.linear.weight, Tensor)
        return float(spectral_norm(self.linear.weight.detach())) if self.bound is None else self.bound


class Linear(ClassificationLayer):
    """`W h + b`, unconstrained."""

    def __init__(self, linear: nn.Linear, bound: float) -> None:
        super().__init__(linear)


class Tanh(Linear):
    """`tanh(W h + b)`, the published head, trained with weight decay: logits in (-1, 1). tanh has slope at most 1."""

    squashes = True

    def forward(self, features: Tensor) -> Tensor:
        """Return the squashed logits N×K in (-1, 1) of features N×C."""
        return torch.tanh(self.pre_squash(features))


class Spectral(ClassificationLayer):
    """`W h + b` with spectral norm of W at most `bound`."""

    def __init__(self, linear: nn.Linear, bound: float) -> None:
        parametrize.register_parametrization(linear, "weight", _AtMost(bound))
        super().__init__(linear, bound)


class Orthogonal(ClassificationLayer):
    """`bound · Q h + b` with orthonormal rows (or columns) in Q: every singular value is `bound`."""

    bound: float

    def __init__(self, linear: nn.Linear, bound: float) -> None:
        bias = linear.bias
        linear.register_parameter("bias", None)
        parametrize.register_parametrization(linear, "weight", _Orthonormal())
        super().__init__(linear, bound)
        self.bias = nn.Parameter(torch.zeros(linear.out_features) if bias is None else bias.detach())

    def pre_squash(self, features: Tensor) -> Tensor:
        """Return the logits N×K of features N×C."""
        out: Tensor = self.bound * self.linear(features) + self.bias
        return out


_HEADS: dict[Head, type[Tanh | Linear | Spectral | Orthogonal]] = {
    "tanh": Tanh, "spectral": Spectral, "orthogonal": Orthogonal, "linear": Linear,
}  # fmt: skip


def classification_layer(
    kind: Head, channels: int, num_classes: int, bound: float = 1.0, *, linear: nn.Linear | None = None
) -> ClassificationLayer:
    """Return a head, N×C → N×K, randomly initialised or around the layer `linear`.

    `bound` is the Lipschitz constant of `spectral` and `orthogonal`.
    """
    if kind not in _HEADS:
        raise unknown_name("head", kind, _HEADS)
    if linear is None:
        linear = nn.Linear(channels, num_classes, bias=kind != "orthogonal")
    return _HEADS[kind](linear, bound)


def spectral_norm(weight: Tensor) -> Tensor:
    """Return the largest singular value of a K×C matrix, differentiable, from its smaller Gram matrix."""
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    largest: Tensor = torch.linalg.eigvalsh(gram)[-1]
    # The root's slope is infinite at 0, where a zero matrix would get NaN gradients.
    return largest.clamp_min(torch.finfo(largest.dtype).tiny).sqrt()


class _AtMost(nn.Module):
    """Parametrisation that scales a matrix down to spectral norm `bound` where it exceeds it."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (spectral_norm(weight) / self.bound).clamp_min(1)


class _Orthonormal(nn.Module):
    """Parametrisation by the Q of a QR decomposition: orthonormal rows, or columns where they are fewer.

    torch's `parametrizations.orthogonal` keeps signs in the weight's diagonal, truncated to integers in its
    Householder form; the first step of weight decay turns them into zeros.
    """

    def forward(self, weight: Tensor) -> Tensor:
        wide = weight.shape[0] < weight.shape[1]
        q: Tensor
        q, r = torch.linalg.qr(weight.T if wide else weight)
        # LAPACK picks the columns' signs by its pivots; with R's diagonal positive, Q is continuous in the weight.
        q = q * (1 - 2 * (r.diagonal() < 0).to(q.dtype))
        return q.T if wide else q
