"""Every format as a constant of OpenVINO: the same codes, and the numbers that our own reader gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit import grid
from lowbit.errors import CheckpointError
from lowbit.formats import format_from_name
from lowbit.kquants import quantize_kquant
from lowbit.openvino.arena import Arena
from lowbit.openvino.constants import hold
from lowbit.openvino.library import core, ops, ov
from lowbit.packing import PackedTensor

# Format -> the type that holds it, and how far its numbers may be from ours, in the largest of the weight.
EXACT, ROUNDED = 1e-6, 5e-3
TYPES = {
    **dict.fromkeys(("int8", "int7", "int6_g32", "int5", "int8_channel", "int8_tensor"), "i8"),
    **dict.fromkeys(("int4", "int3", "int4_g32", "int4_channel", "int4_bf16", "int4_g64_dq"), "i4"),
    "int2": "u2",
    **dict.fromkeys(("int4_asym", "int3_asym", "int2_asym_g32", "int4_fine", "int3_fine", "int2_fine"), "u4"),
    **dict.fromkeys(("int8_asym", "int6_asym", "int5_fine", "int8_asym_channel"), "u8"),
    **dict.fromkeys(("nf4", "nf4_g64_dq", "nf4_fp32"), "nf4"),
    **dict.fromkeys(("fp4_e2m1", "mxfp4", "nvfp4"), "f4e2m1"),
    "fp8_e4m3": "f8e4m3",
    "fp8_e5m2": "f8e5m2",
    "fp6": "i8",
    **dict.fromkeys(("w8a8",), "i8"),
    **dict.fromkeys(("q4_k", "q2_k", "q4_1"), "u4"),
    **dict.fromkeys(("q5_k", "q5_1"), "u8"),
    "q3_k": "i4",
    "q6_k": "i8",
}
LOSSY = {"fp4": "i8", "nf3": "i8", "nf3_bigdl": "i8", "fp6_e3m2": "i8"}


def packed(name: str, rows: int = 12, columns: int = 256) -> PackedTensor:
    format = format_from_name(name)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    weight[0] = 0  # a row without a scale
    return quantize_kquant(weight, format) if format.kind == "kquant" else grid.quantize(weight, format)


def evaluated(weight: PackedTensor) -> np.ndarray:
    """What the graph of a weight gives."""
    with Arena() as arena:
        node = arena.weight(weight, "w")
        row = ops.parameter([], ov.Type.i64)
        model = ov.Model([ops.gather(node, row, ops.constant(np.array(0)))], [row])
        compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.stack([compiled(np.array(i))[0].copy() for i in range(weight.shape[0])])


@pytest.mark.parametrize("name", [*TYPES, *LOSSY])
def test_numbers_are_ours(name: str) -> None:
    weight = packed(name)
    held = hold(weight)
    assert held.codes.type == (TYPES | LOSSY)[name]
    ours = grid.unpack(weight).numpy()
    assert bool(held.note) == (name in LOSSY)
    assert np.abs(evaluated(weight) - ours).max() <= (ROUNDED if held.note else EXACT) * np.abs(ours).max()


@pytest.mark.parametrize("name", ["int4", "int4_asym_g32", "int3", "nf4", "int8_g32", "int2", "mxfp4", "int4_fine"])
@pytest.mark.parametrize("columns", [88, 60])
def test_groups_that_do_not_divide_the_inputs(name: str, columns: int) -> None:
    weight = packed(name, 9, columns)
    ours = grid.unpack(weight).numpy()
    assert np.abs(evaluated(weight) - ours).max() <= EXACT * np.abs(ours).max()


@pytest.mark.parametrize(
    ("name", "type"), [("mxfp4", "i8"), ("nvfp4", "i8"), ("int2", "i4"), ("int4", "i4"), ("nf4", "nf4")]
)
def test_experts_are_held_in_types_that_are_read_packed(name: str, type: str) -> None:
    format = format_from_name(name)
    weight = grid.quantize(torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(3)), format)
    held = hold(weight)
    assert held.codes.type == type and bool(held.note) == (type == "nf4")
    ours = grid.unpack(weight).numpy()
    assert np.abs(evaluated(weight) - ours).max() <= EXACT * np.abs(ours).max()


@pytest.mark.parametrize("name", ["int4", "int4_asym", "int8", "int8_asym", "nf4", "mxfp4"])
def test_codes_are_the_bits_of_the_source(name: str) -> None:
    """Of 4 and 8 bits nothing is done to the stream but to turn the sign of symmetric integers."""
    weight = packed(name)
    format = weight.format
    turned = {4: 0x88, 8: 0x80}[format.bits] if format.kind == "int" and format.symmetric else 0
    stream = weight.codes.numpy().view(np.uint8).ravel()
    assert np.array_equal(hold(weight).codes.array.ravel(), stream ^ np.uint8(turned))


def test_a_graph_of_an_arena_in_a_file_reads_as_the_one_in_memory(tmp_path: Path) -> None:
    """A weight of many pages, one of a few bytes, one that is there twice, a number by itself, and a name that XML escapes."""
    large, small, graph = packed("int4", 512, 1024), packed("int4", 12, 256), tmp_path / "graph.xml"
    row = ops.parameter([], ov.Type.i64)

    def model(arena: Arena) -> ov.Model:
        weights = [arena.weight(large, "large"), arena.weight(small, 'a & "b" <c>'), arena.weight(small, "again")]
        return ov.Model([ops.gather(weight, row, ops.constant(np.array(0))) for weight in weights], [row])

    with Arena() as memory, Arena(graph) as arena:
        expected = core().compile_model(model(memory), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(np.array(3))
        arena.save(model(arena))
    found = core().compile_model(core().read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(np.array(3))
    for number in range(3):
        assert np.array_equal(found[number], expected[number])
    # Nothing but the codes and scales, which are there once, and what keeps them apart.
    held = [hold(weight) for weight in (large, small)]
    size = sum(numbers.array.nbytes for one in held for numbers in (one.codes, one.scales))
    assert size < graph.with_suffix(".bin").stat().st_size < size + 1024
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.bin", "graph.xml"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_a_graph_that_cannot_be_written_takes_no_device_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO removes what it could not write to its end: root's /dev/null went with the first .xml that met a full disk."""
    nowhere, graph = tmp_path / "nowhere", tmp_path / "graph.xml"
    nowhere.symlink_to(os.devnull)
    monkeypatch.setattr(os, "devnull", str(nowhere))  # what stands for it here may be lost
    graph.symlink_to("/dev/full")
    with Arena(graph) as arena:
        x = sum_ = ops.parameter([1], ov.Type.f32)
        for number in range(200):  # more text than a buffer holds
            sum_ = ops.add(sum_, ops.constant(np.full(1, number, np.float32)))
        model = ov.Model([sum_], [x])
        with pytest.raises(CheckpointError, match=r"OpenVINO could not write graph\.xml .*disk is full"):
            arena.save(model)
    assert nowhere.is_symlink() and nowhere.is_char_device()


_MANY = """
import resource, sys
from pathlib import Path
import numpy as np
from lowbit.openvino import spool
from lowbit.runtime.mapped import mapped_bytes, release_pages
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
spool._STRETCH = 1 << 21
held = spool.Spool(spool.nameless(Path(sys.argv[1])))
kept = [held.keep(np.full((3, 1 << 14), i, np.float32)) for i in range(300)]
kept.append(held.keep(np.full(1 << 20, 300, np.float32)))
held.close()
for i, array in enumerate(kept):
    assert mapped_bytes(array) == array.nbytes and (array == i).all()
    release_pages(array)
assert all((array == i).all() for i, array in enumerate(kept))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of handles to set")
def test_a_spool_of_many_arrays_takes_few_handles(tmp_path: Path) -> None:
    """Maps of two megabytes, later of a sixteenth of the file, and one of an array that is larger than either."""
    ended = subprocess.run([sys.executable, "-c", _MANY, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
