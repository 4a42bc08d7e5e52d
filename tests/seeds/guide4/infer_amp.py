"""Guide 4, inference with AMP. What the model answers is kept and printed."""

import torch
import torchvision.models as models

torch.manual_seed(0)

model = models.resnet50(weights="ResNet50_Weights.DEFAULT")
model.eval()
data = torch.rand(1, 3, 224, 224)

model = model.to("xpu")
data = data.to("xpu")

with torch.no_grad():
    d = torch.rand(1, 3, 224, 224)
    d = d.to("xpu")
    with torch.autocast(device_type="xpu", dtype=torch.float16, enabled=True):
        output = model(data)

print(output.dtype, *output.cpu().float()[0, :4].tolist())
print("Execution finished")
