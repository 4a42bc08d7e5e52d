"""Train a network that sees, on an Intel GPU where there is one, and pack it to int8: emoji, and which group each is of."""

import sys
from pathlib import Path

import torch
from torch import nn

import lowbit

sys.path.append(str(Path(__file__).parents[1] / "assets"))
from lowbit_assets import pictures

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
device = "xpu" if torch.xpu.is_available() else "cpu"  # another one with LOWBIT_XPU and python -m lowbit.compat
torch.manual_seed(0)
data = [torch.from_numpy(array).to(device) for valid in (False, True) for array in pictures(valid)[:2]]
images, hidden = (pixels.permute(0, 3, 1, 2) / 255 for pixels in data[::2])
labels, truth = data[1::2]
layers = []
for i, o in ((3, 32), (32, 64), (64, 128), (128, 256)):
    layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 8)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(EPOCHS):
    for rows in torch.randperm(len(images), device=device).split(64):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
model.eval().requires_grad_(False)
before = model(hidden).argmax(1)
lowbit.optimize_model(model, low_bit="int8", conv="int8")
after = model(hidden).argmax(1)
full, packed, same = ((a == b).float().mean() for a, b in ((before, truth), (after, truth), (before, after)))
print(f"right: {full:.1%} in float32, {packed:.1%} in int8, the same answer to {same:.1%}\n{model.lowbit_report}")
assert full > 0.25 and same > 0.95
