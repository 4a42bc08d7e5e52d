"""A tensor on an Intel GPU: the code for CUDA with one word changed.

The guide sets both lines below one another; here the first only runs where there is such a GPU.
"""

import torch

if torch.cuda.is_available():
    tensor = torch.tensor([1.0, 2.0]).to("cuda")

tensor = torch.tensor([1.0, 2.0]).to("xpu")

print(tensor.cpu().tolist())
