"""A compiled ResNet-50 on an Intel GPU. What it answers is kept and printed."""

import torch
import torchvision.models as models

torch.manual_seed(0)

model = models.resnet50(weights="ResNet50_Weights.DEFAULT")
model.eval()
data = torch.rand(1, 3, 224, 224)
ITERS = 10

model = model.to("xpu")
data = data.to("xpu")

model = torch.compile(model)
for i in range(ITERS):
    with torch.no_grad():
        output = model(data)

print(output.dtype, *output.cpu()[0, :4].tolist())
print("Execution finished")
