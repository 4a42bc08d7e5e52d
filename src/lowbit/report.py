"""Report: what happened to every weight of a model. Nothing is skipped or replaced without a line here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from lowbit.errors import CheckpointError, one_line

_DAMAGED = "the report of this model (lowbit_report.json) is damaged, and can be removed: the model loads without it"
# What a field may hold, by its annotation.
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "list[int]": (list,)}
Row = TypeVar("Row")


def _read_row(kind: type[Row], fields: Any, **unsaid: Any) -> Row:
    """A dataclass from JSON, every field of which is of the type that it should be; `unsaid` stands for what is null."""
    if not isinstance(fields, dict):
        raise CheckpointError(f"{_DAMAGED} ({fields!r} is no line of it)")
    types = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(kind) if str(field.type) in _TYPES}  # type: ignore[arg-type]
    known = unsaid | {name: value for name, value in fields.items() if name in types and value is not None}
    for name, value in known.items():
        numbers = value if isinstance(value, list) else []
        if type(value) not in types[name] or not all(type(number) is int for number in numbers):
            raise CheckpointError(f"{_DAMAGED} (it says {name} = {value!r})")
    try:
        return kind(**known)
    except TypeError as error:
        raise CheckpointError(f"{_DAMAGED} ({one_line(str(error))})") from None


@dataclass
class LayerReport:
    """One packed weight. `error` is |w - w^| / |w| over the whole weight; not a number where nobody measured it."""

    path: str
    role: str
    format: str
    shape: list[int]
    bytes_before: int
    bytes_after: int
    error: float
    kernel: str = ""
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        return self.bytes_after * 8 / max(math.prod(self.shape), 1)


@dataclass
class Skipped:
    """One weight left as it was."""

    path: str
    reason: str
    bytes: int = 0


@dataclass
class Report:
    """Every weight of a model: packed, skipped, or small change (norms, biases) that is kept as it is."""

    recipe: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    other_bytes: int = 0
    other_weights: int = 0
    seconds: float = 0.0

    @property
    def bytes_before(self) -> int:
        return sum(r.bytes_before for r in self.layers) + self._kept

    @property
    def bytes_after(self) -> int:
        return sum(r.bytes_after for r in self.layers) + self._kept

    @property
    def _kept(self) -> int:
        return sum(s.bytes for s in self.skipped) + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Over the packed weights."""
        weights = sum(r.bytes_after * 8 / r.bits_per_weight for r in self.layers if r.bits_per_weight)
        return sum(r.bytes_after for r in self.layers) * 8 / weights if weights else 0.0

    @property
    def worst(self) -> list[LayerReport]:
        """The packed weights by error, worst first."""
        return sorted(self.layers, key=lambda r: r.error, reverse=True)

    def formats(self) -> dict[str, int]:
        return dict(Counter(r.format for r in self.layers).most_common())

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "formats": self.formats(),
        }
        found = asdict(self) | totals
        for row in found["layers"]:  # JSON has no word for what is not a number
            row["error"] = None if math.isnan(row["error"]) else row["error"]
        return found

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """What `to_dict` made; anything else was damaged on the way."""
        own = {name: fields.get(name, ()) for name in ("layers", "skipped")}
        if not all(isinstance(rows, list | tuple) for rows in own.values()):
            raise CheckpointError(f"{_DAMAGED} (its layers are no list)")
        layers = [_read_row(LayerReport, row, error=math.nan) for row in own["layers"]]
        skipped = [_read_row(Skipped, row) for row in own["skipped"]]
        return dataclasses.replace(_read_row(cls, fields), layers=layers, skipped=skipped)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} weights packed, {len(self.skipped)} left as they are",
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per packed weight",
        ]
        lines += [f"  left: {row.path}: {row.reason}" for row in self.skipped]
        return "\n".join(lines)
