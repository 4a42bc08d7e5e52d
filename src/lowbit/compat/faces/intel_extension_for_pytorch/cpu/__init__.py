"""`ipex.cpu`: cores and threads, which torch and the operating system have words for."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(
    __name__,
    {
        "runtime": "torch.set_num_threads, or taskset around the script",
        "comm": "torch.distributed",
        "launch": "the script itself: lowbit takes the cores that the process may use",
    },
)
