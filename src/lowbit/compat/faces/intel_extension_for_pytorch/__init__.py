"""The face of `intel_extension_for_pytorch`."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {})
