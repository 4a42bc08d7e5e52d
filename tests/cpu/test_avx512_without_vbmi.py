"""AVX-512 VNNI without VBMI (Cascade Lake, Cooper Lake) looks the bytes of tables up in another way: the same bits come out."""

from __future__ import annotations

import numpy as np
import pytest

from cpu import test_core as core
from lowbit.core import calls

SETS = ("avx512", "avx512_vnni")
TOKENS = (1, 5, 40)


@pytest.mark.skipif(set(core.sets_here(SETS)) != set(SETS), reason="this processor lacks AVX-512 VNNI or VBMI")
@pytest.mark.parametrize("name", core.FORMATS)
def test_every_format_multiplies_as_with_vbmi(name: str) -> None:
    packed, _ = core.quantized(name, 37, 203)
    x = np.random.default_rng(3).standard_normal((max(TOKENS), 203)).astype(np.float32)
    found = []
    for chosen in SETS:
        calls.set_instruction_set(chosen)
        try:
            buffer = core.prepared(packed)
            found.append([core.multiply(buffer, x[:n], 37, c) for n in TOKENS for c in ("auto", "fp32")])
        finally:
            calls.set_instruction_set(None)
    for with_vbmi, without in zip(*found, strict=True):
        assert np.array_equal(with_vbmi, without)
    assert max(np.abs(y).max() for y in found[0]) > 0.1
