"""The line that every script for Intel GPUs began with. At the end: that the name is there."""

import intel_extension_for_pytorch as ipex

print(ipex.__name__)
