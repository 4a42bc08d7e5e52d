"""`optimum.intel.openvino`: the same names."""

from __future__ import annotations

from lowbit.compat.faces.optimum.intel import HOMES, NEAREST
from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, NEAREST, HOMES)
