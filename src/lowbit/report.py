"""Report: what happened to every weight of a model. Nothing is skipped or replaced without a line here."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """One packed weight. `error` is |w - w^| / |w| over the whole weight."""

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
        count = 1
        for n in self.shape:
            count *= n
        return self.bytes_after * 8 / max(count, 1)


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
        return asdict(self) | totals

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        own = {k: fields[k] for k in ("recipe", "other_bytes", "other_weights", "seconds") if k in fields}
        layers = [LayerReport(**row) for row in fields.get("layers", ())]
        return cls(**own, layers=layers, skipped=[Skipped(**row) for row in fields.get("skipped", ())])

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} weights packed, {len(self.skipped)} left as they are",
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per packed weight",
        ]
        lines += [f"  left: {row.path}: {row.reason}" for row in self.skipped]
        return "\n".join(lines)
