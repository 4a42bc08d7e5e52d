"""`ipex_llm.utils.common.log4Error`: a condition that must hold, or an error that says what to do."""

from __future__ import annotations

from lowbit.compat.missing import refuse_unknown


def invalidInputError(condition: object, errMsg: str, fixMsg: str | None = None) -> None:
    """Raise a RuntimeError with the message unless the condition holds."""
    if not condition:
        raise RuntimeError(errMsg if fixMsg is None else f"{errMsg} {fixMsg}")


def invalidOperationError(
    condition: object,
    errMsg: str,
    fixMsg: str | None = None,
    cause: BaseException | None = None,
) -> None:
    """As `invalidInputError`, or the cause itself where there is one."""
    if not condition and cause is not None:
        raise cause
    invalidInputError(condition, errMsg, fixMsg)


__getattr__ = refuse_unknown(__name__, {})
