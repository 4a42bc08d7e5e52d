"""`ipex_llm.utils`: the wrapper that measures, and small things that scripts import."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.compat.names import WORKS, Name

__getattr__ = refuse_unknown(__name__, {}, {"BenchmarkWrapper": f"{__name__}.benchmark_util"})

_UNIT = "tests/unit/test_compat_bigdl.py::"
_IMPORTS = f"{_UNIT}test_submodules_that_scripts_import"
_MEASURES = f"{_UNIT}test_the_wrapper_measures_first_and_later_tokens"
NAMES = (
    Name("ipex_llm.utils.BenchmarkWrapper", "", WORKS, _MEASURES, "`lowbit bench` measures too"),
    Name("ipex_llm.utils.common.invalidInputError", "", WORKS, _IMPORTS),
    Name("ipex_llm.utils.common.log4Error.invalidOperationError", "", WORKS, _IMPORTS),
    Name("ipex_llm.utils.isa_checker.ISAChecker", "", WORKS, _IMPORTS, "`lowbit doctor` says more"),
    Name("ipex_llm.transformers.low_bit_linear.LowBitLinear", "lowbit.layers.LowBitLinear", WORKS, _IMPORTS),
    Name("ipex_llm.transformers.low_bit_linear.FP4Params", "lowbit.layers.PackedWeight", WORKS, _IMPORTS),
    Name("ipex_llm.transformers.low_bit_linear.get_block_size", "lowbit.format_from_name", WORKS, _IMPORTS),
    Name("ipex_llm.transformers.convert.get_enable_ipex", "", WORKS, _IMPORTS, "always False"),
    Name("ipex_llm.ggml.quantize.ggml_tensor_qtype", "lowbit.FORMATS", WORKS, _IMPORTS),
    Name(
        "ipex_llm.transformers.streamer.BatchTextIteratorStreamer", "", WORKS, f"{_UNIT}test_a_batch_streams_its_texts"
    ),
)
