"""Statistics: what calibration tokens say about the inputs x [tokens, in] of a linear.

    tokens         how many rows were seen
    mean_square    mean of x^2 [in]: the importance of each input to the squared error of the output
    mean_size      mean of |x| [in]               largest    max of |x| [in]
    hessian        H = 2/n sum x x^T [in, in]     (fp32): |x (W - W^)^T|^2 summed over tokens is tr(dW H dW^T) n / 2
    cross          C = 2/n sum (x_full - x) x^T   where the inputs in full precision are known too (GPTAQ)

Linears that receive the very same tensor share one Statistics: one Hessian and one Cholesky factor serve query, key
and value.
"""

from __future__ import annotations

import torch


class Statistics:
    """Sums over the inputs of a linear, and the means that algorithms ask for."""

    def __init__(self, in_features: int, device: torch.device | str, hessian: bool = True, cross: bool = False) -> None:
        self.tokens = 0
        self._square = torch.zeros(in_features, device=device)
        self._size = torch.zeros(in_features, device=device)
        self.largest = torch.zeros(in_features, device=device)
        self._products = torch.zeros(in_features, in_features, device=device) if hessian else None
        self._differences = torch.zeros(in_features, in_features, device=device) if cross else None

    def add_(self, x: torch.Tensor, full: torch.Tensor | None = None) -> None:
        """Take inputs [.., in] into account; `full` is what they are in full precision."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        self.tokens += len(rows)
        sizes = rows.abs()
        self._size += sizes.sum(0)
        self.largest = torch.maximum(self.largest, sizes.amax(0))
        self._square += rows.square().sum(0)
        if self._products is not None:
            self._products.addmm_(rows.t(), rows)
        if self._differences is not None and full is not None:
            difference = full.detach().reshape(-1, x.shape[-1]).float() - rows
            self._differences.addmm_(difference.t(), rows)

    @property
    def mean_square(self) -> torch.Tensor:
        return self._square / max(self.tokens, 1)

    @property
    def mean_size(self) -> torch.Tensor:
        return self._size / max(self.tokens, 1)

    @property
    def hessian(self) -> torch.Tensor:
        """A new tensor at every read."""
        assert self._products is not None, "these statistics were collected without a Hessian"
        return self._products * (2 / max(self.tokens, 1))

    @property
    def cross(self) -> torch.Tensor | None:
        return None if self._differences is None else self._differences * (2 / max(self.tokens, 1))

    @property
    def is_blank(self) -> bool:
        """Whether nothing but zeros was seen, or nothing at all."""
        return not bool(self.largest.any())

    def output_error(self, weight: torch.Tensor, restored: torch.Tensor) -> float:
        """tr(dW H dW^T): twice the mean over tokens of |x dW^T|^2."""
        difference = weight.float() - restored.float()
        return float(((difference @ self.hessian) * difference).sum())
