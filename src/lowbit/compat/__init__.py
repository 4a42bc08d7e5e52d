"""Scripts written for BigDL-LLM, ipex-llm, Intel Extension for PyTorch and Neural Compressor run as they are.

    python -m lowbit.compat script.py --its --own arguments

runs one: its imports are answered by lowbit. In a process of one's own, a test session for one, a single call does the same:

    import lowbit.compat
    lowbit.compat.install()

    from bigdl.llm.transformers import AutoModelForCausalLM

`import lowbit` alone answers no name but its own. docs/migration.md lists every old name beside lowbit's.
"""

from __future__ import annotations

from lowbit.compat.installing import Installed, install

__all__ = ["Installed", "install"]
