"""Stands where torchvision would, which has no build to install here: what the scripts of the PyTorch guide use of it.

A ResNet-50 with weights drawn from a seed, the four transforms, and a data set of drawn pictures under the name CIFAR10.
Only tests see it, by PYTHONPATH.
"""

from torchvision import datasets, models, transforms

__version__ = "0.0"
__all__ = ["datasets", "models", "transforms"]
