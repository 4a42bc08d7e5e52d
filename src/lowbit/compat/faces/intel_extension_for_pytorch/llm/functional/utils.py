"""`ipex.llm.functional.utils`: masks of that library's own attention, which nothing here needs."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

__getattr__ = refuse_unknown(__name__, {"ipex_update_causal_mask": "transformers.masking_utils.create_causal_mask"})
