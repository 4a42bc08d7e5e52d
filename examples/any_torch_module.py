"""Any torch module: a small convolutional network, packed to 8 and to 4 bits."""

import copy

import torch
from torch import nn

import lowbit

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(8),
    nn.Flatten(),
    nn.Linear(2048, 256),
    nn.ReLU(),
    nn.Linear(256, 10),
)
picture = torch.randn(1, 3, 32, 32)
expected = network(picture)

for name in ("int8", "int4", "nf4"):
    packed = lowbit.optimize_model(copy.deepcopy(network), low_bit=name, conv="int8")
    error = (packed(picture) - expected).norm() / expected.norm()
    print(f"{name}: {packed.lowbit_report.bytes_after / 1e3:.0f} kB, output changed by {error:.1%}")
    assert error < 0.2
