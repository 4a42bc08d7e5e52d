"""`ipex_llm.utils.isa_checker`: which instructions this processor has."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown
from lowbit.machine import this_machine


class ISAChecker:
    """Answers by the flags of the processor."""

    def __init__(self) -> None:
        self.flags = this_machine().flags

    def check_avx(self) -> bool:
        return self.check_avx2()

    def check_avx2(self) -> bool:
        return "avx2" in self.flags

    def check_avx_vnni(self) -> bool:
        return "avx_vnni" in self.flags

    def check_avx512(self) -> bool:
        return {"avx512f", "avx512bw"} <= set(self.flags)

    def check_avx512_vnni(self) -> bool:
        return "avx512_vnni" in self.flags


isa_checker = ISAChecker()
check_avx, check_avx2, check_avx_vnni = isa_checker.check_avx, isa_checker.check_avx2, isa_checker.check_avx_vnni
check_avx512, check_avx512_vnni = isa_checker.check_avx512, isa_checker.check_avx512_vnni


def is_server() -> bool:
    return check_avx512_vnni()


def is_spr() -> bool:
    """Sapphire Rapids and its kin, which have both kinds of VNNI."""
    return check_avx_vnni() and check_avx512_vnni()


__getattr__ = refuse_unknown(__name__, {})
