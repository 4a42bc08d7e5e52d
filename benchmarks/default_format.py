"""Which formats should `int4` stand for? The distance from the original model, and the bits, of many recipes.

Every row packs the reference model off its grid (see `lowbit_assets.reference`) by a recipe, puts the weights back as
they would be read, and measures the mean KL divergence from the unpacked model. Bits per weight are the stored bytes of
all weights, the tied embedding and head once, norms included. Both models see the same windows, so a row is compared
with another by its differences window by window: their standard error is a fifth of the single ones.

One model is one draw: rounding it differently moves the KL by as much as a small idea does. The recipes that matter are
therefore measured on other drafts of the model too, moved off the grid by other seeds (`--seeds`).

    python benchmarks/default_format.py                                2 cores, some 30 minutes: a look, written to build/
    python benchmarks/default_format.py --windows 48 --device cuda     what results/default_format.md was made with
    python benchmarks/default_format.py --only "int4_g64, tied int5_g32"   rows of the kept table again, beside the first
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import measured_again
import torch
from safetensors.torch import load_file
from selection import caveats
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.algorithms.rtn import round_weight
from lowbit.errors import nearest
from lowbit.evaluate import Divergence, Perplexity, divergence, standard_error, token_ids
from lowbit.formats import as_format
from lowbit.grid import unpack
from lowbit.models.walk import find_targets
from lowbit.quantize import plan
from lowbit.recipe import VALUES, Recipe, recipe_named
from lowbit_assets import chunks, move_scales, reference_model, text

BUDGET = 4.6
WINDOW = 512
WINDOWS = 48
LOOK = 6
TEXTS = ("sqlite_valid", "moby_dick")
NUMBERS = "default_format.json"
REFERENCE_SEED = 2026
ATTENTION_INPUTS = r"(^|\.)[qkv]_proj$"


@dataclass(frozen=True)
class Candidate:
    """A recipe with a name: the linears | the values' own format | the tied embedding and head."""

    linear: str
    tied: str | None = None
    values: str | None = None
    rounder: str = "rtn"
    where: str = VALUES

    @property
    def name(self) -> str:
        own = {VALUES: "v", ATTENTION_INPUTS: "qkv"}[self.where]
        parts = [self.linear, f"{own} {self.values}" if self.values else "", f"tied {self.tied}" if self.tied else ""]
        plain = " (plain RTN)" if self.rounder == "plain_rtn" else ""
        return ", ".join(part for part in parts if part) + plain

    @property
    def recipe(self) -> Recipe:
        tied = as_format(self.tied) if self.tied else None
        overrides = ((self.where, as_format(self.values)),) if self.values else ()
        return Recipe(as_format(self.linear), tied, tied, overrides=overrides, rounder=self.rounder)


def plain_and_searched(linear: str, tied: str | None = None) -> list[Candidate]:
    return [Candidate(linear, tied, rounder=rounder) for rounder in ("plain_rtn", "rtn")]


SEARCH = [row for linear in ("int4_g64", "int4_g32", "int4_asym_g64", "int3_g64") for row in plain_and_searched(linear)]
TIED = [
    row
    for tied in ("int4_g64", "int4_asym_g32", "int5_g64", "int5_asym_g64")
    for row in plain_and_searched("int4_g64", tied)
]
UNIFORM = [
    *(Candidate("int4_asym_g64", tied) for tied in ("int5_asym_g64", "int5_g64", "int4_asym_g32")),
    *(Candidate("int4_g32", tied) for tied in ("int4_asym_g32", "int4_g32")),
    *(Candidate("int4_g64", tied) for tied in ("int5_asym_g64", "int5_g32", "int5_channel")),
    *(Candidate("int4_asym_g128", tied) for tied in ("int6_channel", "int5_asym_g32")),
    Candidate("int4_g128", "int6_g128"),
]
VALUES_APART = [
    Candidate("int4_g64", "int5_asym_g64", "int8_g64"),
    *(Candidate("int4_g64", tied, "int6_g64") for tied in ("int5_g32", "int5_asym_g64", "int5_g64")),
    Candidate("int4_g64", "int5_g64", "int5_g64", where=ATTENTION_INPUTS),
    Candidate("int4_asym_g64", "int5_g64", "int5_g64"),
    Candidate("int4_g32", "int4_asym_g32", "int5_g32"),
    Candidate("int4_asym_g64", "int5_g128", "int6_g64"),
    Candidate("int4_asym_g128", "int5_asym_g32", "int6_g64"),
]
ELSEWHERE = [
    Candidate("int4_g32_dq", "int5_asym_g32_dq"),
    Candidate("int4_g32_dq", "int5_asym_g32_dq", "int6_g32_dq"),
    Candidate("nf4_g64", "int5_asym_g64"),
    Candidate("nf4_g32_dq", "int5_asym_g32_dq"),
]
SECTIONS = {
    "What the search is worth: linears alone, the tied embedding and head left in fp32": SEARCH,
    "The tied embedding and head, under int4_g64 linears": TIED,
    f"One format for the linears, one for the tied table, at no more than {BUDGET} bits": UNIFORM,
    f"The value projections apart, at no more than {BUDGET} bits": VALUES_APART,
    "Other kinds of number, for comparison": ELSEWHERE,
}
# Measured on other drafts of the model as well.
SEEDED = [
    Candidate("int4_asym_g64", "int5_asym_g64"),
    Candidate("int4_g32", "int4_asym_g32"),
    Candidate("int4_g64", "int5_g32"),
    *VALUES_APART[:2],
    VALUES_APART[7],
]
# Widths of the reference model's rows: a group that leaves a tail in one has no place in compressed-tensors.
WIDTHS = (576, 1536)


def offered(candidate: Candidate) -> bool:
    """Whether the default may be this recipe: what compressed-tensors, the saved form of integer models, can say.

    Groups divide every row, and there are no zero points, which transformers reads only where all layers have one format.
    """
    names = (candidate.linear, candidate.tied, candidate.values)
    formats = [as_format(name) for name in names if name]
    whole = all(f.group_size < 0 or width % f.group_size == 0 for f in formats for width in WIDTHS)
    plain = all(f.kind == "int" and not f.scale_block for f in formats)
    return (
        candidate.tied is not None and whole and plain and (all(f.symmetric for f in formats) or len(set(formats)) == 1)
    )


@dataclass(frozen=True)
class Row:
    """What one recipe costs and gives, per text."""

    name: str
    bits: float
    texts: dict[str, Divergence]

    @property
    def windows_kl(self) -> list[float]:
        return [kl for found in self.texts.values() for kl in found.windows_kl]

    @property
    def kl(self) -> float:
        return sum(self.windows_kl) / len(self.windows_kl)


class Bench:
    """The model, its original weights, and what the original predicts: on `windows` of each text, or the first of them."""

    def __init__(self, plain: Path, device: str, windows: int, first: int | None = None) -> None:
        self.plain = plain
        self.model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).to(device).eval()
        self.targets = find_targets(self.model)
        tokenizer = AutoTokenizer.from_pretrained(plain)
        cut = {name: chunks(token_ids(tokenizer, text(name)), WINDOW, windows) for name in TEXTS}
        self.ids = {name: torch.tensor(rows[:first]) for name, rows in cut.items()}
        self.move_off_grid(REFERENCE_SEED)
        self.original = self.remember()

    def move_off_grid(self, seed: int) -> None:
        """Take a draft of the model as the original: the same function, moved off the grid by a seed."""
        config = json.loads((self.plain / "config.json").read_text())
        weights = load_file(self.plain / "model.safetensors")
        moved = {name: torch.from_numpy(move_scales(name, w.numpy(), config, seed)) for name, w in weights.items()}
        self.model.load_state_dict(moved, strict=False)
        self.dense = {t.path: t.module.weight.detach().clone() for t in self.targets if not t.tied_to}
        self.held: dict[str, tuple[Any, ...]] = {}

    def remember(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The original as a function: its last hidden states are kept, its logits are made again from them."""
        head = self.model.get_output_embeddings().weight.detach().clone()
        states = {}
        with torch.inference_mode():
            for row in torch.cat(list(self.ids.values())):
                hidden = self.model.base_model(row[None].to(head.device)).last_hidden_state
                states[tuple(row.tolist())] = hidden[0]
        return lambda ids: states[tuple(ids[0].tolist())] @ head.T

    def measure(self, candidate: Candidate, first: int | None = None) -> Row:
        """One row of the table, on all windows or only the first of each text."""
        start = time.perf_counter()
        bits = self.pack(candidate.recipe)
        found = {n: divergence(self.model, self.original, ids, windows=first) for n, ids in self.ids.items()}
        row = Row(candidate.name, bits, found)
        print(f"{row.name:60s} {bits:6.3f} bits  KL {row.kl:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
        return row

    def pack(self, recipe: Recipe) -> float:
        """Put weights in the model as they would be read after packing; gives stored bits per weight."""
        paths = [t.path for t in self.targets if not t.tied_to]
        with torch.inference_mode():
            for target in self.targets:
                if not target.tied_to:
                    self.round_(target.path, plan(target, self.targets, recipe).formats, recipe.rounder)
        total = sum(p.numel() for p in self.model.parameters())
        rest = total - sum(w.numel() for w in self.dense.values())
        return (sum(self.held[path][-1] for path in paths) + 4 * rest) * 8 / total

    def round_(self, path: str, formats: tuple[Any, ...], rounder: str) -> None:
        """Bring one weight to a format; one that already is there stays."""
        wanted = (formats, rounder)
        if self.held.get(path, ())[:2] == wanted:
            return
        weight, size = self.dense[path], self.dense[path].nbytes
        if formats:
            packed = round_weight(weight, formats[0], rounder)
            weight, size = unpack(packed), packed.nbytes
        self.model.get_submodule(path).weight.data.copy_(weight)
        self.held[path] = (*wanted, size)


def with_error(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def rows_table(rows: list[Row], against: Row) -> str:
    """A section of the report; differences are taken window by window against one row."""
    lines = []
    for row in rows:
        first, second = (row.texts[name] for name in TEXTS)
        difference = [a - b for a, b in zip(row.windows_kl, against.windows_kl, strict=True)]
        mean = sum(difference) / len(difference)
        lines.append(
            (
                f"**{row.name}**" if row is against else row.name,
                f"{row.bits:.3f}",
                with_error(first.kl, first.standard_error),
                with_error(second.kl, second.standard_error),
                f"{row.kl:.4f}",
                "" if row is against else f"{mean:+.4f} ± {standard_error(difference):.4f}",
                f"{first.perplexity.ppl:.2f}",
                f"{second.perplexity.ppl:.2f}",
                f"{100 * first.agreement:.1f}%",
            )
        )
    head = (
        "recipe",
        "bits",
        "KL sqlite",
        "KL Moby Dick",
        "KL both",
        "difference",
        "ppl sqlite",
        "ppl Moby Dick",
        "top 1",
    )
    return common.table(head, lines)


def report(data: dict[str, Any]) -> str:
    """The whole of results/default_format.md but the machine, from the numbers."""
    rows = {row.name: row for row in map(row_from, data["rows"])}
    against = rows[default_candidate().name]
    original = [against.texts[name].original.ppl for name in TEXTS]
    parts = [
        "# The default 4-bit recipe: KL from the original against bits per weight\n",
        "The reference model off its grid (SmolLM2-135M-Instruct, 134.5 M weights, of which the tied embedding and head "
        f"are 28.3 M), {data['windows']} windows of {WINDOW} tokens of each text. Perplexity of the original: "
        f"{original[0]:.2f} and {original[1]:.2f}. Errors are standard errors over windows; differences are taken "
        f"window by window against the default, **{against.name}**, whose recipe is `int4`. Bits count every stored "
        "byte of every weight, norms in fp32.\n",
    ]
    for title, candidates in SECTIONS.items():
        found = [rows[c.name] for c in candidates if c.name in rows]
        parts.append(f"## {title}\n\n{rows_table(found, against)}\n")
    possible = [rows[c.name] for c in all_candidates().values() if offered(c) and c.name in rows]
    best = min((row for row in possible if row.bits <= BUDGET), key=lambda row: row.kl)
    parts.append(
        f"Lowest at no more than {BUDGET} bits of those that compressed-tensors, the saved form of integer models, can say "
        "(groups that divide every row; zero points only where all layers have one format, as transformers reads them): "
        f"**{best.name}**, KL {best.kl:.4f} at {best.bits:.3f} bits.\n"
    )
    may_be_default = {c.name for c in all_candidates().values() if offered(c)}
    parts.append(caveats(data, against, rows, may_be_default.__contains__, BUDGET))
    parts += measured_again.section(data)
    if data["seeds"]:
        parts.append(f"## The same on other drafts of the model, KL over both texts\n\n{seeds_table(data['seeds'])}\n")
    return "\n".join(parts)


def seeds_table(found: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in found})
    by_name: dict[str, dict[int, float]] = {}
    for row in found:
        by_name.setdefault(row["name"], {})[row["seed"]] = row_from(row).kl
    lines = []
    for name, values in by_name.items():
        cells = [f"{values[seed]:.4f}" if seed in values else "" for seed in seeds]
        lines.append((name, *cells, f"{sum(values.values()) / len(values):.4f}"))
    return common.table(("recipe", *(f"seed {seed}" for seed in seeds), "mean"), lines)


def all_candidates() -> dict[str, Candidate]:
    """Every row by name, the recipe `int4` among them whatever it is."""
    listed = [c for section in SECTIONS.values() for c in section]
    return {c.name: c for c in (*listed, default_candidate())}


def default_candidate() -> Candidate:
    """The recipe `int4` as a row of the table."""
    recipe = recipe_named("int4")
    values = dict(recipe.overrides).get(VALUES)
    tied = recipe.head.name if recipe.head else None
    made = Candidate(recipe.linear.name, tied, values.name if values else None)
    return next((c for c in (*UNIFORM, *VALUES_APART) if c.recipe == made.recipe), made)


def row_from(found: dict[str, Any]) -> Row:
    """A row read back from results/default_format.json."""
    texts = {}
    for name, numbers in found["texts"].items():
        both = {key: Perplexity(**numbers[key]) for key in ("perplexity", "original")}
        texts[name] = Divergence(**numbers | both | {"windows_kl": tuple(numbers["windows_kl"])})
    return Row(found["name"], found["bits"], texts)


def measure_all(chosen: argparse.Namespace) -> Path:
    """Measure every row; the numbers are written after each, so that a run that is cut short is not lost."""
    windows = chosen.windows or LOOK
    bench = Bench(chosen.reference or reference_model("plain"), chosen.device, windows)
    data: dict[str, Any] = {"machine": common.machine(chosen.device, chosen.commit), "windows": windows}
    data |= {"rows": [], "seeds": []}
    numbers: Path = chosen.results / NUMBERS
    # In this order most weights of a row are in the model already.
    for candidate in sorted(all_candidates().values(), key=lambda c: (c.rounder, c.linear, c.where, c.values or "")):
        data["rows"].append(asdict(bench.measure(candidate)))
        numbers.write_text(json.dumps(data))
    for seed in range(1, chosen.seeds + 1):
        bench.move_off_grid(seed)
        for candidate in SEEDED:
            data["seeds"].append({"seed": seed} | asdict(bench.measure(candidate, min(24, windows))))
            numbers.write_text(json.dumps(data))
    return numbers


def measure_again(chosen: argparse.Namespace) -> Path:
    """Measure some rows of the kept table once more, on its windows; they are kept beside the first."""
    known = all_candidates()
    unknown = next((name for name in chosen.only if name not in known), None)
    if unknown is not None:
        raise SystemExit(f"no recipe of the table is called {unknown!r}: {nearest(unknown, known)}")
    numbers: Path = chosen.results / NUMBERS
    data = json.loads(numbers.read_text())
    windows = min(chosen.windows or data["windows"], data["windows"])
    bench = Bench(chosen.reference or reference_model("plain"), chosen.device, data["windows"], windows)
    rows = measured_again.begin_run(data, common.machine(chosen.device, chosen.commit), windows)
    for name in chosen.only:
        rows.append(asdict(bench.measure(known[name])))
        numbers.write_text(json.dumps(common.rounded(data)) + "\n")
    return numbers


def home_of(windows: int, kept: bool) -> Path:
    """Where a run is written: one of few windows is a look, not the table that the choice of the default rests on."""
    return common.RESULTS if kept or windows >= WINDOWS else common.SCRATCH


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument(
        "--windows", type=int, help=f"windows of each text (default: {LOOK}; {WINDOWS} for the table that is kept)"
    )
    options.add_argument(
        "--seeds", type=int, default=0, help="other drafts of the model to measure the best recipes on"
    )
    options.add_argument("--reference", type=Path, help="a folder with the plain reference model, if not in the cache")
    options.add_argument("--again", action="store_true", help="write the report again from the numbers of the last run")
    options.add_argument("--only", nargs="+", metavar="RECIPE", help="measure these rows of the kept table once more")
    options.add_argument("--remark", action="append", default=[], help="a remark on the run, kept with its numbers")
    options.set_defaults(results=None)
    chosen = options.parse_args()
    chosen.results = chosen.results or home_of(chosen.windows or LOOK, chosen.again or bool(chosen.only))
    chosen.results.mkdir(parents=True, exist_ok=True)
    measure = measure_again if chosen.only else measure_all
    numbers = chosen.results / NUMBERS if chosen.again else measure(chosen)
    data = json.loads(numbers.read_text())
    data["remarks"] = [*data.get("remarks", ()), *chosen.remark]
    common.write_results(chosen.results, numbers.stem, report(data), data)


if __name__ == "__main__":
    main()
