"""Guide 4, is there an Intel GPU."""

import torch

print(torch.xpu.is_available())
