"""`ipex_llm.utils.common`: checks of a script's own arguments."""

from __future__ import annotations

from lowbit.compat.faces.ipex_llm.utils.common.log4Error import invalidInputError, invalidOperationError
from lowbit.compat.missing import refuse_unknown

__all__ = ["invalidInputError", "invalidOperationError"]

__getattr__ = refuse_unknown(
    __name__, {"LazyImport": "importlib.import_module", "MuteHFLogger": "transformers.logging"}
)
