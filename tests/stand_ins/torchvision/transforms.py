"""The four transforms that the guide composes, over pictures [height, width, channels] of bytes and tensors [channels, h, w]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        planes = picture.permute(2, 0, 1)[None].float()
        larger = torch.nn.functional.interpolate(planes, self.size, mode="bilinear", antialias=True)[0]
        return larger.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


class ToTensor:
    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, planes: torch.Tensor) -> torch.Tensor:
        return (planes - self.mean) / self.std
