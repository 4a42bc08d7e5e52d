"""The summary of a calibration that Intel Extension for PyTorch keeps as JSON, read and written.

    {"model.layers.0.self_attn": {"q_op_infos": {"0": {
        "op_type", "fqn",
        "input_tensor_infos":  [{"inf_dtype", "scale", "zero_point", "smooth_quant_scaling_factor"}],
        "weight_tensor_infos": [{"inf_dtype", "scale", "zero_point", "smooth_quant_scaling_factor"}],
        "activation_observer", "weight_observer", ..}, ..}, "nonq_op_infos", "layer_output_infos"}, ..}

One entry for each module that holds linears of its own (" " is the model itself), operations numbered as they stand in it. The
range of an input is that after smoothing. A column of the weight is multiplied by its factor, the input by the inverse, which
that system does at every call and lowbit in the weights before: `"lowbit"` in an operation says in which ones, and is what their
files lack; it also says how much of the signal the steps of the range lose, and which range was seen. Only linears are read; a
linear whose "inf_dtype" is floating point is left as it is, and one whose range is no longer the one that was seen was given
another by hand: so such a file is tuned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.contents import read_json
from lowbit.errors import CheckpointError

_ROOT = " "
_OWN = "lowbit"
_QUINT8, _QINT8, _FLOAT = "torch.quint8", "torch.qint8", "torch.float32"
_LINEARS = ("Linear", "Conv1D", "F.linear", "function linear")
# Signed codes are those of a range less this.
_MIDDLE = 128
# What float32 needs to be read back as the same number.
_DIGITS = 9


@dataclass(frozen=True)
class FoldPlace:
    """Where the inverse of a smoothing factor goes: the weight `previous`, for the linears whose first is `group`."""

    group: str
    previous: str
    others: tuple[str, ...] = ()
    offset: float = 0.0
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LinearSummary:
    """What is known of one linear: the grid of its inputs (None: nothing was seen), the scale of each row of its weight, and
    the factor of each column with its place, where it is smoothed. `is_left` keeps it in full precision. `noise`: what the steps
    lose, step^2 / 12 to the mean square of the inputs. `seen`: step and zero as calibration found them, where a file says so."""

    path: str
    step: float | None
    zero: int
    weight_scales: tuple[float, ...]
    factors: tuple[float, ...] = ()
    place: FoldPlace | None = None
    is_left: bool = False
    noise: float | None = None
    seen: tuple[float, int] | None = None

    @property
    def is_edited(self) -> bool:
        """Whether somebody gave its inputs another range than the one that was seen."""
        if self.seen is None or self.step is None:
            return False
        return self.zero != self.seen[1] or not math.isclose(self.step, self.seen[0], rel_tol=1e-6)

    @property
    def input_range(self) -> tuple[float, float] | None:
        if self.step is None:
            return None
        return -self.zero * self.step, (255 - self.zero) * self.step


def write_summary(path: str | Path, linears: Sequence[LinearSummary], observers: Mapping[str, Any]) -> None:
    """Write a summary; `observers` are the settings "activation_observer" and "weight_observer" that all of them share."""
    modules: dict[str, dict[str, Any]] = {}
    for number, linear in enumerate(linears):
        parent = linear.path.rpartition(".")[0] or _ROOT
        operations = modules.setdefault(parent, {"q_op_infos": {}, "nonq_op_infos": {}, "layer_output_infos": []})
        operations["q_op_infos"][str(len(operations["q_op_infos"]))] = _operation(linear, number, observers)
    Path(path).write_text(_laid_out(modules) + "\n", encoding="utf-8")


def _operation(linear: LinearSummary, number: int, observers: Mapping[str, Any]) -> dict[str, Any]:
    kind = _FLOAT if linear.is_left or linear.step is None else _QUINT8
    given: dict[str, Any] = {"id": number, "orig_dtype": _FLOAT, "inf_dtype": kind, "force_dtype": kind}
    weight: dict[str, Any] = {"orig_dtype": _FLOAT, "inf_dtype": _FLOAT if linear.is_left else _QINT8}
    weight |= {"scale": _short(linear.weight_scales), "zero_point": [0] * len(linear.weight_scales)}
    key = f"{number}_0"
    if linear.step is not None:
        scale, zero = _short([linear.step]), [linear.zero]
        smooth = bool(linear.factors)
        given |= {"scale": {key: scale} if smooth else scale, "zero_point": {key: zero} if smooth else zero}
    if linear.factors:
        factors = _short(linear.factors)
        given["smooth_quant_scaling_factor"] = {key: _short([1 / factor for factor in factors])}
        weight["smooth_quant_scaling_factor"] = factors
    settings = {name: dict(setting) for name, setting in observers.items()}
    for setting in settings.values():
        if "smooth_quant_enabled" in setting:
            setting["smooth_quant_enabled"] = bool(linear.factors)
    operation: dict[str, Any] = {
        "op_type": "<class 'torch.nn.modules.linear.Linear'>",
        "op_type_is_module": True,
        "fqn": linear.path,
        "input_tensor_infos": [given],
        "weight_tensor_infos": [weight],
        "output_tensor_infos": [{"orig_dtype": _FLOAT, "inf_dtype": _FLOAT}],
        **settings,
    }
    own: dict[str, Any] = {} if linear.noise is None else {"noise": _short([linear.noise])[0]}
    if linear.step is not None:
        seen = linear.seen or (linear.step, linear.zero)
        own["seen"] = {"scale": _short(seen[:1])[0], "zero_point": seen[1]}
    place = linear.place
    if place is not None:
        rows = None if place.rows is None else list(place.rows)
        own |= {"group": place.group, "previous": place.previous, "others": list(place.others), "offset": place.offset}
        own |= {"rows": rows}
    return operation | ({_OWN: own} if own else {})


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _laid_out(modules: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with a line for each field of an operation: long lists of numbers would fill pages."""
    parts = []
    for name, module in modules.items():
        operations = []
        for number, operation in module["q_op_infos"].items():
            fields = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in operation.items())
            operations.append(f"   {json.dumps(number)}: {{\n{fields}\n   }}")
        rest = "".join(f",\n  {json.dumps(k)}: {json.dumps(v)}" for k, v in module.items() if k != "q_op_infos")
        listed = ",\n".join(operations)
        parts.append(f' {json.dumps(name)}: {{\n  "q_op_infos": {{\n{listed}\n  }}{rest}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}"


def read_summary(path: str | Path) -> list[LinearSummary]:
    """The linears that a summary speaks of, in its order."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"there is no summary {file}: save_qconf_summary writes one after the calibration")
    fields = read_json(file)
    modules = [module for module in fields.values() if isinstance(module, dict)]
    found = []
    for module in modules:
        for operation in (module.get("q_op_infos") or {}).values():
            if any(kind in str(operation.get("op_type")) for kind in _LINEARS):
                found.append(_read_linear(file, operation))
    if not found:
        raise CheckpointError(
            f'{file} names no linear under "q_op_infos": it is no summary that save_qconf_summary wrote'
        )
    return found


def _read_linear(file: Path, operation: dict[str, Any]) -> LinearSummary:
    path = operation.get("fqn")
    try:
        given, weight = operation["input_tensor_infos"][0], operation["weight_tensor_infos"][0]
        step, zero = _first(given.get("scale")), _first(given.get("zero_point"))
        factors = weight.get("smooth_quant_scaling_factor")
        if factors is None and given.get("smooth_quant_scaling_factor") is not None:
            factors = [1 / factor for factor in _list(given["smooth_quant_scaling_factor"])]
        own = operation.get(_OWN) or {}
        return LinearSummary(
            str(path),
            None if step is None else float(step),
            0 if zero is None else int(zero) + (_MIDDLE if given.get("inf_dtype") == _QINT8 else 0),
            tuple(map(float, weight.get("scale") or ())),
            tuple(map(float, factors or ())),
            _read_place(own) if "group" in own else None,
            "float" in str(given.get("inf_dtype")) and step is not None,
            None if own.get("noise") is None else float(own["noise"]),
            (float(own["seen"]["scale"]), int(own["seen"]["zero_point"])) if "seen" in own else None,
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file} is damaged at the linear {path!r} ({error}): calibrate again") from None


def _read_place(place: dict[str, Any]) -> FoldPlace:
    rows = place["rows"]
    return FoldPlace(
        str(place["group"]),
        str(place["previous"]),
        tuple(map(str, place["others"])),
        float(place["offset"]),
        None if rows is None else tuple(map(int, rows)),
    )


def _list(value: Any) -> list[Any]:
    """A list as files of different age have it: as such, or by the key of a weight."""
    if isinstance(value, dict):
        return list(next(iter(value.values()), []))
    return list(value)


def _first(value: Any) -> Any:
    values = [] if value is None else _list(value) if isinstance(value, dict | list) else [value]
    return values[0] if values else None
