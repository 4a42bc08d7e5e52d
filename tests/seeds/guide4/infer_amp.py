"""A ResNet-50 on an Intel GPU in mixed precision. What it answers is kept and printed.

The products are in float16, or, as a comment of the guide has it, in bfloat16: "bf16" behind the script's name says so.
"""

import sys

import torch
import torchvision.models as models

dtype = torch.bfloat16 if sys.argv[1:] == ["bf16"] else torch.float16
torch.manual_seed(0)

model = models.resnet50(weights="ResNet50_Weights.DEFAULT")
model.eval()
data = torch.rand(1, 3, 224, 224)

model = model.to("xpu")
data = data.to("xpu")

with torch.no_grad():
    d = torch.rand(1, 3, 224, 224)
    d = d.to("xpu")
    with torch.autocast(device_type="xpu", dtype=dtype, enabled=True):
        output = model(data)

print(output.dtype, *output.cpu().float()[0, :4].tolist())
print("Execution finished")
