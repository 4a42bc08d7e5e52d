"""A data set under the name CIFAR10: pictures of 32 by 32 that are drawn, a stripe whose place and colour tell the class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

CLASSES, SIDE = 10, 32
# A few small batches, which a processor can still train on.
PICTURES = 32


class CIFAR10(Dataset[Any]):
    def __init__(
        self, root: str, train: bool = True, transform: Callable[[Any], Any] | None = None, download: bool = False
    ) -> None:
        file = Path(root) / ("train.pt" if train else "test.pt")
        if download and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_draw(), file)
        if not file.exists():
            raise RuntimeError("the data set is not there: say download=True")
        self.pictures = torch.load(file, weights_only=True)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = self.pictures[index]
        return (picture if self.transform is None else self.transform(picture)), index % CLASSES


def _draw() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 64, (PICTURES, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        place = index % CLASSES * 3
        picture[place : place + 3, :, index % 3] = 255
    return pictures
