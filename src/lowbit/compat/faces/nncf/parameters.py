"""`nncf.parameters`: where the words of `compress_weights` live."""

from __future__ import annotations

from lowbit.compat.faces.nncf import ENUMERATIONS
from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {}, dict.fromkeys(ENUMERATIONS, "lowbit.openvino"))
