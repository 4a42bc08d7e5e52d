"""Statistics: what calibration tokens say about the inputs x [tokens, in] of a linear.

    tokens         how many rows were seen
    mean_square    mean of x^2 [in]: the importance of each input to the squared error of the output
    mean_size      mean of |x| [in]               largest    max of |x| [in]
    hessian        H = 2/n sum x x^T [in, in]     (fp32): |x (W - W^)^T|^2 summed over tokens is tr(dW H dW^T) n / 2
    differences    sum (x_full - x) x^T, where the inputs in full precision are known too (GPTAQ): C but for H's factor

Linears that receive the very same tensor share one Statistics: one Hessian and one Cholesky factor serve query, key
and value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows at a time: copies in fp32 of more are a burden where inputs are wide.
_ROWS = 2048
_STRIPES = 4


class Statistics:
    """Sums over the inputs of a linear, and the means that algorithms ask for."""

    def __init__(self, in_features: int, device: torch.device | str, hessian: bool = True, cross: bool = False) -> None:
        self.tokens = 0
        self._square = torch.zeros(in_features, device=device)
        self._size = torch.zeros(in_features, device=device)
        self.largest = torch.zeros(in_features, device=device)
        self._products = torch.zeros(in_features, in_features, device=device) if hessian else None
        # sum x x^T is symmetric: above the stripes nothing is computed until somebody asks.
        self._mirrored = True
        self.differences = torch.zeros(in_features, in_features, device=device) if cross else None

    def add_(self, x: torch.Tensor, full: torch.Tensor | None = None) -> None:
        """Take inputs [.., in] into account; `full` is what they are in full precision."""
        given = torch.split(x.detach().reshape(-1, x.shape[-1]), _ROWS)
        wanted: Sequence[torch.Tensor | None] = [None] * len(given)
        if full is not None:
            wanted = torch.split(full.detach().reshape(-1, x.shape[-1]), _ROWS)
        for part, other in zip(given, wanted, strict=True):
            if len(part):
                self._add_rows_(part.float(), other)

    def _add_rows_(self, rows: torch.Tensor, full: torch.Tensor | None) -> None:
        self.tokens += len(rows)
        sizes = rows.abs()
        self._size += sizes.sum(0)
        self.largest = torch.maximum(self.largest, sizes.amax(0))
        self._square += sizes.square_().sum(0)
        if self._products is not None:
            for first, end in _stripes(len(self._products)):
                self._products[first:end, :end].addmm_(rows[:, first:end].t(), rows[:, :end])
            self._mirrored = False
        if self.differences is not None and full is not None:
            self.differences.addmm_((full.float() - rows).t(), rows)

    def divided(self, scale: torch.Tensor) -> Statistics:
        """The statistics of the same inputs divided by a scale [in]."""
        found = Statistics(len(scale), scale.device, hessian=False)
        found.tokens, found.largest = self.tokens, self.largest / scale
        found._square, found._size = self._square / scale.square(), self._size / scale
        if self._products is not None:
            found._products = self.products / scale / scale[:, None]
        return found

    @property
    def mean_square(self) -> torch.Tensor:
        return self._square / max(self.tokens, 1)

    @property
    def mean_size(self) -> torch.Tensor:
        return self._size / max(self.tokens, 1)

    @property
    def products(self) -> torch.Tensor:
        """sum x x^T: H but for a factor."""
        assert self._products is not None, "these statistics were collected without a Hessian"
        if not self._mirrored:
            for first, end in _stripes(len(self._products)):
                self._products[:first, first:end] = self._products[first:end, :first].t()
            self._mirrored = True
        return self._products

    @property
    def diagonal(self) -> torch.Tensor:
        """That of H."""
        return self.products.diagonal() * (2 / max(self.tokens, 1))

    @property
    def hessian(self) -> torch.Tensor:
        """A new tensor at every read."""
        return self.products * (2 / max(self.tokens, 1))

    @property
    def is_blank(self) -> bool:
        """Whether nothing but zeros was seen, or nothing at all."""
        return not bool(self.largest.any())

    def output_error(self, weight: torch.Tensor, restored: torch.Tensor) -> float:
        """tr(dW H dW^T): twice the mean over tokens of |x dW^T|^2."""
        difference = weight.float() - restored.float()
        return float(((difference @ self.hessian) * difference).sum())


def _stripes(size: int) -> list[tuple[int, int]]:
    """The rows of a symmetric matrix in stripes; those up to their diagonal are 10 of its 16 parts."""
    step = -(-size // _STRIPES)
    return [(first, min(first + step, size)) for first in range(0, size, step)]
