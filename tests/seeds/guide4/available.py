"""Whether torch sees an Intel GPU."""

import torch

print(torch.xpu.is_available())
