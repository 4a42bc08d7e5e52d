"""What a script that wants DeepSpeed is told today. This is not the guide's block "Distributed Inference with DeepSpeed".

That block shares a model between several processes, and comes with lowbit on several devices. Until then both names by which a
script reaches for it are refused, each with a sentence that says so.
"""

import intel_extension_for_pytorch as ipex

try:
    ipex.deepspeed  # noqa: B018 - the name itself is what is asked for
except AttributeError as refused:
    print(refused)
try:
    from intel_extension_for_pytorch.distributed import init
except ImportError as refused:
    print(refused)
