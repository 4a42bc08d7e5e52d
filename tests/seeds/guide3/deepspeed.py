"""The block "Distributed Inference with DeepSpeed", up to its import: that package is not there, and lowbit says what to use."""

import intel_extension_for_pytorch as ipex

try:
    ipex.deepspeed  # noqa: B018 - the name itself is what is asked for
except AttributeError as refused:
    print(refused)
try:
    from intel_extension_for_pytorch.distributed import init
except ImportError as refused:
    print(refused)
