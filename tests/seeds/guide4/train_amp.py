"""A ResNet-50 learns pictures on an Intel GPU in mixed precision, its gradients scaled, and is saved with its optimizer.

The products are in float16, or, as a comment of the guide has it, in bfloat16: "bf16" behind the script's name says so. At the top:
how wide the pictures are made and how many are a batch, 224 and 128 in the guide, which a processor takes minutes for. At the end:
the scale of the gradients, which is halved with each step that overflowed and was left out, and the loss of every batch.
"""

import sys

import torch
import torchvision

LR = 0.001
DOWNLOAD = True
DATA = "datasets/cifar10/"

SIDE, BATCH = 64, 4

use_amp = True
dtype = torch.bfloat16 if sys.argv[1:] == ["bf16"] else torch.float16

torch.manual_seed(0)

transform = torchvision.transforms.Compose(
    [
        torchvision.transforms.Resize((SIDE, SIDE)),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
)
train_dataset = torchvision.datasets.CIFAR10(
    root=DATA,
    train=True,
    transform=transform,
    download=DOWNLOAD,
)
train_loader = torch.utils.data.DataLoader(dataset=train_dataset, batch_size=BATCH)

model = torchvision.models.resnet50()
criterion = torch.nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
scaler = torch.amp.GradScaler(enabled=use_amp)

model.train()
model = model.to("xpu")
criterion = criterion.to("xpu")

losses = []
for batch_idx, (data, target) in enumerate(train_loader):
    data = data.to("xpu")
    target = target.to("xpu")
    with torch.autocast(device_type="xpu", dtype=dtype, enabled=use_amp):
        output = model(data)
        loss = criterion(output, target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(batch_idx)
    losses.append(loss.item())

torch.save(
    {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    },
    "checkpoint.pth",
)

print("scale", scaler.get_scale())
print("losses", *losses)
print("Execution finished")
