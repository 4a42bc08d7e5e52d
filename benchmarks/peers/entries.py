"""Who is measured: ours and the peers, each with its file, the flags to try, and what it reads for a token.

`entries(place, model, width)` lists those of one width (4, 8 or 16 bits) for one model. An entry is made into a runner
with one of its `variants`; which variant is its best is found by the benchmark on the machine itself, because it differs
between processors, contexts and models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from peers.runners import Command, PeerError, Runner, Worker
from peers.tasks import LONG_PROMPT, Task

WORKERS = Path(__file__).parent / "workers"
# Weights by part: linears, head, and whether the head is the embedding.
SIZES = {"random-1.1b": (968_884_224, 100_663_296, False), "smollm2": (106_168_320, 28_311_552, True)}
# Weights of the last layer behind its keys and values: ours does not ask them of tokens whose logits nobody wants.
LAST_LAYER = {"random-1.1b": 38_797_312, "smollm2": 2_985_984}
# The group of OpenVINO's and torchao's int4: 576, SmolLM2's width, is no multiple of 128.
GROUPS = {"random-1.1b": 128, "smollm2": 64}

Variant = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Place:
    """Where everything lies, and how it is run."""

    peers: Path
    threads: int = 2
    ik_bin: Path | None = None
    llama_bin: Path | None = None
    without_amx: Path | None = None  # a library to preload that keeps AMX from the peers
    cores: str = ""  # the cores to stay on, as taskset takes them
    isa: str = ""  # the instruction set that ours uses, if not the machine's best

    @property
    def models(self) -> Path:
        return self.peers / "models"

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("taskset", "-c", self.cores) if self.cores else ()

    @property
    def variables(self) -> tuple[tuple[str, str], ...]:
        return (("LD_PRELOAD", str(self.without_amx)),) if self.without_amx else ()

    def python(self, peer: str) -> Path:
        return self.peers / peer / "bin" / "python"

    def command(self, words: list[str]) -> list[str]:
        assigned = [f"{name}={value}" for name, value in self.variables]
        return [*self.prefix, *(["env", *assigned] if assigned else []), *words]


@dataclass(frozen=True)
class Entry:
    """One program with one file."""

    program: str
    file: str
    path: Path
    bits: float
    megabytes: float
    make: Callable[[Variant, Task], Runner]
    variants: dict[str, tuple[Variant, ...]] = field(default_factory=dict)
    quality: str = ""  # the row of peers_quality.json that says how far the file is from the original
    ours: bool = False

    @property
    def name(self) -> str:
        return f"{self.program} {self.file}"

    def to_try(self, task: Task) -> tuple[Variant, ...]:
        """Variants for a task. Memory, interrupts and repacks are of the flags that serve decoding as a rule: the first."""
        kind = task.kind if task.kind in self.variants else "decode"
        variants = self.variants.get(kind, ((),))
        return variants[:1] if task.kind in ("memory", "interrupt", "repack") else variants

    @property
    def there(self) -> bool:
        return self.path.exists()


def variant(**flags: Any) -> Variant:
    return tuple(flags.items())


def words_of(chosen: Variant) -> str:
    """A variant as people read it."""
    return " ".join(f"{name}={value}" for name, value in chosen) or "as it comes"


def entries(place: Place, model: str, width: int) -> list[Entry]:
    """All that hold a model in weights of about `width` bits; ours first."""
    found = our_entries(place, model, width)
    found += llama_entries(place, model, width)
    found += openvino_entries(place, model, width)
    found += ort_entries(place, model, width)
    found += torch_entries(place, model, width)
    return found


# --- ours ---------------------------------------------------------------------------------------------------------------

_SIX_BIT_TABLES = ("--head", "int6_g64", "--embedding", "int6_g64")
_FOUR_BIT_GATES = ("--override", r"(gate|up)_proj$=int4_g64")
_EIGHT_BIT_VALUES = ("--override", r"(^|\.)v_proj$=int8_g64")
_CALIBRATED = ("--algorithm", "gptq", "--calibration", "default", "--calibration", "own", "--samples", "96")
# What `lowbit quantize` is told for each of our files, by name. A peer's file meets only those that are no further from the
# original than it is; the wider ones are there to meet llama.cpp's Q4_K_M.
OUR_RECIPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "int4": (4, ()),
    "int4_g32 h6": (4, ("--format", "int4_g32", *_SIX_BIT_TABLES)),
    "int5_g64 v8 h6": (4, ("--format", "int5_g64", *_SIX_BIT_TABLES, *_EIGHT_BIT_VALUES)),
    "int6_g64": (4, ("--format", "int6_g64")),
    "int4 v8 h6": (4, (*_SIX_BIT_TABLES, *_EIGHT_BIT_VALUES)),
    "int4 gptq v8 h6": (4, (*_CALIBRATED, *_SIX_BIT_TABLES, *_EIGHT_BIT_VALUES)),
    "int5_g64 u4 gptq v8 h6": (
        4,
        ("--format", "int5_g64", *_CALIBRATED, *_SIX_BIT_TABLES, *_FOUR_BIT_GATES, *_EIGHT_BIT_VALUES),
    ),
    "int8_g64": (8, ("--format", "int8_g64")),
    "bf16": (16, ()),
}
# SmolLM2's Q4_K_M has 6.2 bits, see gguf_quality; at the 1.1 B's 5 bits no such recipes are needed.
ONLY_SMALL = ("int6_g64", "int5_g64 u4 gptq v8 h6")
# No text calibrates a random model: the plainly rounded folder, whose bytes lie in the same places, stands in for these.
STANDS_IN = {"int4 gptq v8 h6": "int4 v8 h6"}
SPARE = 64  # positions that a cache has more than a task needs


def our_caches(width: int) -> tuple[Variant, ...]:
    """The engine's own choice, which is int8 for low-bit weights and fp16 for others, and the type that it did not choose."""
    return (variant(), variant(cache="int8" if width == 16 else "fp16"))


def our_folder(models: Path, model: str, name: str) -> Path:
    """The saved folder of a recipe; bf16 is the original as it stands."""
    name = STANDS_IN.get(name, name) if model == "random-1.1b" else name
    return models / (f"hf-{model}" if name == "bf16" else f"lowbit-{model}-{name.replace(' ', '-')}")


def made_for(model: str, name: str) -> bool:
    return model == "smollm2" or name not in ONLY_SMALL


def our_entries(place: Place, model: str, width: int) -> list[Entry]:
    found = []
    linears, head, _ = SIZES[model]
    for name, (bits, _) in OUR_RECIPES.items():
        if bits != width or not made_for(model, name):
            continue
        path = our_folder(place.models, model, name)
        # bf16 is held exactly in 12 bits (runtime/tight.py; 12.02 of the 1.1 B).
        megabytes = (linears + head) * 1.5 / 1e6 if name == "bf16" else our_megabytes(path, model)
        make = partial(our_runner, place, path)
        caches = our_caches(width)
        variants = {"decode": caches, "start": caches[:1]}
        stored_bits = megabytes * 8e6 / (linears + head)
        found.append(Entry("lowbit", name, path, stored_bits, megabytes, make, variants, f"lowbit {name}", ours=True))
    return found


def our_runner(place: Place, path: Path, chosen: Variant, task: Task) -> Runner:
    slots = {"slots": task.sequences} if task.sequences > 1 else {}
    isa = {"isa": place.isa} if place.isa else {}
    positions = 0 if task.kind == "repack" else task.context + task.new  # a repack's context counts rows of a weight
    options = dict(chosen) | slots | isa | {"context": positions + SPARE}
    return Worker(Path(sys.executable), WORKERS / "run_ours.py", path, place.threads, options, place.prefix)


@cache
def our_megabytes(folder: Path, model: str) -> float:
    """Megabytes of weights that one token reads: all packed ones, but not a table that is only looked up."""
    from lowbit.packing import PackedTensor
    from lowbit.runtime.files import open_files, read_spec, read_weights

    if not folder.exists():
        return 0.0
    _, _, tied = SIZES[model]
    files = open_files(folder)
    read = (loaded for loaded in read_weights(files, read_spec(files), None) if tied or loaded.role != "embedding")
    return sum(loaded.weight.nbytes for loaded in read if isinstance(loaded.weight, PackedTensor)) / 1e6


# --- llama.cpp and ik_llama.cpp -----------------------------------------------------------------------------------------

GGUF_TYPES = {4: ("Q4_0", "Q4_K_M"), 8: ("Q8_0",), 16: ()}
LLAMA_DECODE = (
    variant(fa="on", cache="f16", repack=1),
    variant(fa="on", cache="q8_0", repack=1),
    variant(fa="off", cache="f16", repack=1),
    variant(fa="on", cache="f16", repack=0),
)
IK_DECODE = (
    variant(fa=1, cache="q8_0", rtr=1),
    variant(fa=1, cache="f16", rtr=1),
    variant(fa=1, cache="q8_0", rtr=0),
)
IK_PREFILL = (*IK_DECODE, variant(fa=1, cache="f16", rtr=0))


def llama_entries(place: Place, model: str, width: int) -> list[Entry]:
    programs = {
        "llama.cpp": (place.llama_bin or place.peers / "llama" / "bin", LLAMA_DECODE, LLAMA_DECODE),
        "ik_llama.cpp": (place.ik_bin or place.peers / "ik" / "bin", IK_DECODE, IK_PREFILL),
    }
    linears, head, _ = SIZES[model]
    found = []
    for kind in GGUF_TYPES[width]:
        path = place.models / f"{model}-{kind}.gguf"
        if not path.exists():
            continue
        megabytes = gguf_megabytes(path, model)
        bits = megabytes * 8e6 / (linears + head)
        for program, (programs_folder, decode, prefill) in programs.items():
            make = partial(llama_runner, place, program, programs_folder, path)
            variants = {"decode": decode, "prefill": prefill, "start": (decode[0], decode[-1])}  # repacked or not
            where = path if (programs_folder / "llama-bench").exists() else programs_folder / "llama-bench"
            found.append(Entry(program, kind, where, bits, megabytes, make, variants, gguf_quality(model, kind)))
    return found


def gguf_quality(model: str, kind: str) -> str:
    """The file of the reference model that was made as this one was: see peers_quality.py for the width."""
    return f"GGUF {kind}" if model == "smollm2" or kind == "Q8_0" else f"GGUF {kind}, width 256 n"


def gguf_megabytes(path: Path, model: str) -> float:
    from lowbit.interop.gguf_container import read_container

    _, _, tied = SIZES[model]
    stored = read_container(path).entries.items()
    return sum(len(tensor.data) for name, tensor in stored if tied or name != "token_embd.weight") / 1e6


def llama_runner(place: Place, program: str, folder: Path, model: Path, chosen: Variant, _: Task) -> Runner:
    flags = dict(chosen)
    return Command(
        lambda task: place.command(llama_command(program, folder, model, place.threads, flags, task)), llama_figure
    )


def llama_command(
    program: str, folder: Path, model: Path, threads: int, flags: dict[str, Any], task: Task
) -> list[str]:
    ik = program.startswith("ik")
    attention = ["-fa", str(flags.get("fa", 1 if ik else "on"))]
    cache = ["-ctk", flags.get("cache", "f16"), "-ctv", flags.get("cache", "f16")]
    common = ["-m", str(model), "-t", str(threads), *attention, *cache]
    if task.kind == "batch":
        room = task.sequences * (task.context + task.new) + 256
        repack = ["-rtr"] if flags.get("rtr") else ["--no-repack"] if flags.get("repack") == 0 else []
        if ik:  # its older common options: a switch without a value
            common = ["-m", str(model), "-t", str(threads), *(["-fa", "on"] if flags.get("fa") else []), *cache]
        counts = ["-npp", str(task.context), "-ntg", str(task.new), "-npl", str(task.sequences), "-c", str(room)]
        return [str(folder / "llama-batched-bench"), *common, *repack, *counts]
    common += ["-rtr", str(flags.get("rtr", 0))] if ik else ["--repack", str(flags.get("repack", 1))]
    bench = [str(folder / "llama-bench"), *common, "-r", "1", "-o", "json"]
    if task.kind == "start":  # a process that reads a prompt and ends: no warm-up, nothing more than the first token
        return [*bench, "-p", str(task.context), "-n", "0", *(["-w", "0"] if ik else ["--no-warmup"])]
    if task.kind == "prefill":
        cold = (["-w", "0"] if ik else ["--no-warmup"]) if task.context > LONG_PROMPT else []
        return [*bench, "-p", str(task.context), "-n", "0", *cold]
    if ik:
        return [*bench, "-p", "0", "-n", "0", "-gp", f"{task.context},{task.new}"]
    return [*bench, "-p", "0", "-n", str(task.new), "-d", str(task.context)]


def llama_figure(task: Task, printed: str) -> float:
    if task.kind == "batch":
        rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
        speeds = [float(row[8]) for row in rows if len(row) > 8 and row[8].strip().replace(".", "").isdigit()]
        if not speeds:
            raise PeerError(f"no figure in {printed[-300:]!r}")
        return speeds[-1]
    found = json.loads(printed[printed.index("[") :])
    return float(found[-1]["avg_ts"])


# --- the Python peers ---------------------------------------------------------------------------------------------------


def has_amx() -> bool:
    return "amx_int8" in Path("/proc/cpuinfo").read_text()


def openvino_entries(place: Place, model: str, width: int) -> list[Entry]:
    if width == 16:
        return []
    linears, head, _ = SIZES[model]
    bits = 4 + 16 / GROUPS[model] if width == 4 else 8
    megabytes = (linears * bits / 8 + head) / 1e6  # its head is int8 in both
    path = place.models / f"openvino-{model}-int{width}"
    decode = [(), variant(ATTENTION_BACKEND="SDPA")]
    if has_amx():
        decode.append(variant(INFERENCE_PRECISION_HINT="f32"))
    prefill = [*decode, variant(DYNAMIC_QUANTIZATION_GROUP_SIZE=GROUPS[model])]
    make = partial(python_runner, place, "openvino", "run_openvino.py", path)
    start = ((), variant(CACHE_DIR=str(place.models / "openvino-cache")))
    variants: dict[str, tuple[Variant, ...]] = {"decode": tuple(decode), "prefill": tuple(prefill), "start": start}
    file = f"int4 g{GROUPS[model]}" if width == 4 else "int8"
    return [Entry("OpenVINO", file, path, bits, megabytes, make, variants, f"OpenVINO int{width}")]


def ort_entries(place: Place, model: str, width: int) -> list[Entry]:
    if width != 4:
        return []
    linears, head, _ = SIZES[model]
    path = place.models / f"ort-{model}-int4"
    make = partial(python_runner, place, "ortgenai", "run_ortgenai.py", path)
    megabytes = (linears + head) * 5 / 8 / 1e6  # a 32-bit scale for 32 weights
    return [Entry("onnxruntime-genai", "int4 b32", path, 5, megabytes, make, {}, "ORT int4")]


def torch_entries(place: Place, model: str, width: int) -> list[Entry]:
    linears, head, _ = SIZES[model]
    path = place.models / f"hf-{model}"
    variants: dict[str, tuple[Variant, ...]] = {"decode": (variant(compile=True), ()), "prefill": ((),), "start": ((),)}
    if width == 16:
        made = partial(python_runner, place, "torch", "run_transformers.py", path)
        return [Entry("transformers", "bf16", path, 16, (linears + head) * 2 / 1e6, made, variants)]
    group = GROUPS[model]
    kind = {"kind": f"torchao-int{width}", "group": group}
    bits = 4 + 32 / group if width == 4 else 8  # a bf16 scale and a bf16 zero a group
    make = partial(python_runner, place, "torch", "run_transformers.py", path, **kind)
    megabytes = (linears + head) * bits / 8 / 1e6
    return [Entry("torchao", f"int{width}", path, bits, megabytes, make, variants, f"torchao int{width}")]


def python_runner(
    place: Place, environment: str, worker: str, path: Path, chosen: Variant, _: Task, **fixed: Any
) -> Runner:
    options = fixed | dict(chosen)
    return Worker(
        place.python(environment), WORKERS / worker, path, place.threads, options, place.prefix, place.variables
    )


def generate_entry(place: Place, model: str) -> Entry:
    """Our low-bit model through `model.generate` of transformers, beside the engine without torch."""
    path = our_folder(place.models, model, "int4")
    worker = Worker(
        Path(sys.executable), WORKERS / "run_transformers.py", path, place.threads, {"kind": "lowbit"}, place.prefix
    )
    megabytes = our_megabytes(path, model)
    return Entry("lowbit", "int4, model.generate", path, 0, megabytes, lambda *_: worker, ours=True)
