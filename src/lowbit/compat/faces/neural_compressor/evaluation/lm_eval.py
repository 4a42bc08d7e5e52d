"""`neural_compressor.evaluation.lm_eval`: tasks of a package that lowbit does not bring."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown

_INSTEAD = "`lowbit evaluate MODEL --text FILE` for perplexity, or lm_eval.simple_evaluate of the package lm-eval with this model"
__getattr__ = refuse_unknown(__name__, {"evaluate": _INSTEAD, "LMEvalParser": _INSTEAD})
