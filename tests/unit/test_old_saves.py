"""Folders that BigDL-LLM and ipex-llm saved: blocks packed here by hand, read by lowbit, and refused where they cannot be."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lowbit
from lowbit.algorithms.rtn import round_weight
from lowbit.errors import CheckpointError
from lowbit.formats import LEVELS
from lowbit.grid import unpack
from lowbit.interop.ipex_blocks import OLD_TYPES, UNREADABLE, read_blocks
from lowbit.layers import packed_weights
from lowbit_assets import tiny_model
from unit.checkpoint_cases import logits

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def load_exact(folder: Path) -> Any:
    """An old folder, computed in fp32."""
    model = lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True, torch_dtype=torch.float32)
    return in_fp32(model)


def in_fp32(model: Any) -> Any:
    for weight in packed_weights(model).values():
        weight.compute = "fp32"
    return model


def nibbles(codes: np.ndarray) -> bytes:
    return bytes(int(codes[i]) | int(codes[i + 32]) << 4 for i in range(32))


def crossed(codes: np.ndarray) -> bytes:
    return bytes(int(codes[i]) << 4 | int(codes[i + 32]) for i in range(32))


def low_fours(codes: np.ndarray) -> bytes:
    return bytes(int(c[i + 4]) | int(c[i]) << 4 for c in codes.reshape(8, 8) for i in (2, 0, 3, 1))


def high_twos(codes: np.ndarray) -> bytes:
    quads = codes.reshape(4, 4, 4)
    return bytes(sum(int(q[3 - k, i]) << 2 * k for k in range(4)) for q in quads for i in (2, 0, 3, 1))


def one_bit(bits: np.ndarray) -> bytes:
    return sum(int(bit) << place for place, bit in enumerate(bits)).to_bytes(8, "little")


def quarters(codes: np.ndarray) -> bytes:
    return bytes(sum(int(c) << 6 - 2 * k for k, c in enumerate(four)) for four in codes.reshape(16, 4))


def levels_of(table: str) -> np.ndarray:
    return np.array(LEVELS[table])


Block = tuple[bytes, np.ndarray]


def symmetric(pack: Callable[[np.ndarray], bytes], codes: np.ndarray, d: float) -> Block:
    return struct.pack("<e", d) + pack(codes), (codes - 8.0) * np.float64(np.float16(d))


def table_of_four_bits(table: str, codes: np.ndarray, d: float) -> Block:
    pack = crossed if table == "nf4" else nibbles
    return struct.pack("<e", d) + pack(codes), levels_of(table)[codes] * np.float64(np.float16(d))


def super_block(random: np.random.Generator) -> Block:
    """256 weights of q4_k, with bytes for scales and minima."""
    d, dmin = (float(np.float16(random.uniform(0.001, 0.01))) for _ in range(2))
    codes, pairs = random.integers(0, 16, (8, 32)), random.integers(0, 64, (8, 2))
    nibbles_of = b"".join(bytes(int(c[i]) | int(c[i + 16]) << 4 for i in range(16)) for c in codes)
    numbers = d * pairs[:, :1] * codes - dmin * pairs[:, 1:]
    return struct.pack("<ee", d, dmin) + bytes(pairs.flatten().tolist()) + nibbles_of, numbers.flatten()


def eight_bits(table: str, codes: np.ndarray, d: float) -> Block:
    codes = np.where(np.isfinite(levels_of(table)[codes]), codes, 1)
    return struct.pack("<f", d) + bytes(codes.tolist()), levels_of(table)[codes] * np.float64(np.float32(d))


def make_block(old: str, random: np.random.Generator) -> Block:
    """One block of an old type, and the numbers in it."""
    d = float(random.uniform(0.01, 0.05)) * (1 if random.random() < 0.5 else -1)
    m = float(random.uniform(-0.2, 0.0))
    half, least = np.float64(np.float16(d)), np.float64(np.float16(m))
    four, five, six = (random.integers(0, 1 << bits, 64) for bits in (4, 5, 6))
    three, eight = random.integers(0, 8, 64), random.integers(0, 256, 64)
    match old:
        case "sym_int4" | "woq_int4":
            return symmetric(nibbles, four, d)
        case "q4_k":
            return super_block(random)
        case "asym_int4":
            return struct.pack("<ee", d, m) + nibbles(four), four * half + least
        case "sym_int5":
            return struct.pack("<e", d) + one_bit(five >> 4) + nibbles(five & 15), (five - 16) * half
        case "asym_int5":
            return struct.pack("<ee", d, m) + one_bit(five >> 4) + nibbles(five & 15), five * half + least
        case "sym_int8":
            signed = eight - 128
            return struct.pack("<f64b", d, *signed.tolist()), signed * np.float64(np.float32(d))
        case "nf3":
            levels = levels_of("nf3_bigdl")[three]
            return struct.pack("<e", d) + one_bit(three >> 2) + quarters(three & 3), levels * half
        case "fp6":
            levels = levels_of("e3m2")[six] * 2.0**-12
            return low_fours(six & 15) + high_twos(six >> 4) + struct.pack("<e", 1000 * d), levels * np.float16(
                1000 * d
            )
        case "fp8_e4m3":
            raw, numbers = eight_bits("e4m3", eight, d)
            return raw, numbers / 256
        case "fp8" | "fp8_e5m2":
            return eight_bits("e5m2", eight, d)
    return table_of_four_bits({"nf4": "nf4", "fp4": "e2m1"}[old], four, d)


def pack_old(old: str, shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of random blocks: its bytes as the old library kept them, and its numbers."""
    random = np.random.default_rng(seed)
    blocks = [make_block(old, random) for _ in range(shape[0] * shape[1] // OLD_TYPES[old].weights)]
    data = torch.frombuffer(bytearray(b"".join(raw for raw, _ in blocks)), dtype=torch.uint8)
    numbers = torch.from_numpy(np.concatenate([values for _, values in blocks])).float().view(shape)
    return (data.view(torch.bfloat16) if old == "nf4" else data), numbers


@pytest.mark.parametrize("old", [old for old, kind in OLD_TYPES.items() if kind.fields])
def test_every_block_is_read_as_it_was_written(old: str) -> None:
    data, numbers = pack_old(old, (3, 512))
    packed = read_blocks("w", data, old, (3, 512))
    torch.testing.assert_close(unpack(packed), numbers, rtol=1e-6, atol=1e-6)
    with pytest.raises(CheckpointError, match="bytes"):
        read_blocks("w", data[:-1], old, (3, 128))


# What the old libraries made of `written_weight()`, in hexadecimal: ipex-llm 2.2.0 where nothing else is said.
WRITTEN: dict[str, str] = json.loads(Path(__file__).with_name("old_blocks.json").read_text())


def written_weight() -> torch.Tensor:
    """Four blocks of 64, each larger than the one before."""
    place = torch.arange(256)
    return ((place * 37 % 101 - 50) / 64 * (1 + place // 64) / 4)[None]


@pytest.mark.parametrize("wrote", WRITTEN)
def test_what_the_old_library_wrote_is_the_weight_that_it_was_given(wrote: str) -> None:
    """Within twice what our own rounding into that format loses: it cut small floats off. Bits in wrong places lose nearly all."""
    old, weight = wrote.partition(" ")[0], written_weight()
    packed = read_blocks("w", torch.frombuffer(bytearray.fromhex(WRITTEN[wrote]), dtype=torch.uint8), old, (1, 256))
    lost, own = (
        float((unpack(p) - weight).norm() / weight.norm()) for p in (packed, round_weight(weight, packed.format))
    )
    assert 0.8 * own < lost < 2.1 * own < 0.6


def test_k_quants_are_ggufs_own_blocks() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    for name in ("q2_k", "q4_k_gguf", "q5_k", "q6_k"):
        packed = lowbit.optimize_model(nn.Sequential(nn.Linear(256, 4)), low_bit=name[:4])[0].packed_weight
        packed.set_dense_(weight)
        canonical = packed.packed()
        assert torch.equal(unpack(read_blocks("w", canonical.codes.flatten(), name, (4, 256))), unpack(canonical))


def test_a_scale_that_no_q4_k_has_is_refused() -> None:
    data, _ = pack_old("q4_k", (3, 256))
    data[148 + 4 + 7] = 64
    with pytest.raises(CheckpointError, match="a scale of 64 in a block of q4_k, which ends at 63"):
        read_blocks("w", data, "q4_k", (3, 256))


def old_folder(place: Path, old: str, merged: bool = True, **more: Any) -> tuple[Path, Any]:
    """A tiny llama as the old library saved it, and the same model in full precision."""
    wide = {"hidden_size": 256, "intermediate_size": 256} if OLD_TYPES[old].weights > 64 else {}
    dense = tiny_model("llama", place / "dense", tie_word_embeddings=False, **SIZES | wide)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    state = model.state_dict()
    kinds = {name: "sym_int8" if more.get("mixed") and "lm_head" in name else old for name in state}
    packed: dict[str, torch.Tensor] = {}
    for seed, (name, tensor) in enumerate(sorted(state.items())):
        if tensor.dim() == 2 and "embed_tokens" not in name:
            packed[name], numbers = pack_old(kinds[name], (tensor.shape[0], tensor.shape[1]), seed)
            state[name] = numbers
        else:
            packed[name] = tensor.clone()
    model.load_state_dict(state)
    for name in [name for name in packed if name.endswith("q_proj.weight")] if merged else ():
        parts = [name, name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")]
        packed[name.replace("q_proj", "qkv_proj")] = torch.cat([packed.pop(part) for part in parts])
    folder = place / "old"
    folder.mkdir()
    fields = json.loads((dense / "config.json").read_text())
    fields |= {"bigdl_transformers_low_bit": old, "bigdl_lcmu_enabled": True, "bigdl_disk_embedding": False}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "load_keys.json").write_text(json.dumps({"all_checkpoint_keys": sorted(packed)}))
    torch.save(packed, folder / "pytorch_model.bin")
    return folder, model.eval()


@pytest.mark.parametrize(
    ("old", "merged"),
    [("sym_int4", True), ("asym_int4", False), ("nf4", True), ("nf3", True), ("fp6", False), ("q4_k", True)],
)
def test_an_old_folder_answers_as_its_numbers_do(old: str, merged: bool, tmp_path: Path) -> None:
    folder, dense = old_folder(tmp_path, old, merged)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        lowbit.AutoModelForCausalLM.load_low_bit(folder)
    model = load_exact(folder)
    with pytest.warns(UserWarning, match="low-bit already and is loaded as it is; the format asked for is ignored"):
        lowbit.AutoModelForCausalLM.from_pretrained(folder, allow_pickle=True, load_in_4bit=True)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert {row.format for row in model.lowbit_report.layers} == {OLD_TYPES[old].format}
    model.save_low_bit(tmp_path / "new")
    again = in_fp32(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "new").glob("*.bin"))


def test_shards_and_a_head_of_another_type(tmp_path: Path) -> None:
    folder, dense = old_folder(tmp_path, "sym_int4", mixed=True)
    held = torch.load(folder / "pytorch_model.bin", weights_only=True)
    names = sorted(held)
    files = {name: f"pytorch_model-0000{1 + (place > 9)}-of-00002.bin" for place, name in enumerate(names)}
    for file in sorted(set(files.values())):
        torch.save({name: held[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "pytorch_model.bin").unlink()
    model = load_exact(folder)
    assert model.lm_head.packed_weight.format.name == "int8_fp32"
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    (folder / files[names[0]]).unlink()
    with pytest.raises(CheckpointError, match="lacks pytorch_model-00001"):
        lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x))
        return y


def test_a_plain_module_from_an_old_folder(tmp_path: Path) -> None:
    data, numbers = pack_old("sym_int5", (32, 64))
    dense = _Two()
    with torch.no_grad():
        dense.first.weight.copy_(numbers)
    torch.save({**dense.state_dict(), "first.weight": data}, tmp_path / "pytorch_model.bin")
    (tmp_path / "bigdl_config.json").write_text('{"bigdl_transformers_low_bit": "sym_int5"}')
    with lowbit.low_memory_init():
        model = _Two()
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        lowbit.load_low_bit(model, tmp_path)
    model = in_fp32(lowbit.load_low_bit(model, tmp_path, allow_pickle=True))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.place, "ran")


@pytest.mark.parametrize("held", ["trap", "number", "list"])
def test_what_is_no_tensor_is_refused_and_not_run(held: str, tmp_path: Path) -> None:
    folder, _ = old_folder(tmp_path, "sym_int4")
    state: Any = torch.load(folder / "pytorch_model.bin", weights_only=True)
    place = tmp_path / "ran"
    thing: Any = {"trap": _Trap(place), "number": 3}.get(held)
    torch.save([1, 2] if held == "list" else state | {"model.norm.weight": thing}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="other than tensors"):
        lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True)
    assert not place.exists()


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    folder, _ = old_folder(tmp_path, "sym_int4")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True)


@pytest.mark.parametrize("old", [*UNREADABLE, "sym_int9"])
def test_a_type_that_cannot_be_read_says_why(old: str, tmp_path: Path) -> None:
    folder, _ = old_folder(tmp_path, "sym_int4")
    fields = json.loads((folder / "config.json").read_text()) | {"bigdl_transformers_low_bit": old}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=UNREADABLE.get(old, "did you mean sym_int8")):
        lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True)


def test_a_folder_of_another_type_or_model_is_refused(tmp_path: Path) -> None:
    folder, _ = old_folder(tmp_path, "sym_int4")
    held = torch.load(folder / "pytorch_model.bin", weights_only=True)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"bigdl_transformers_low_bit": "sym_int8"}))
    with pytest.raises(CheckpointError, match="bytes in the folder"):
        lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True)
    (folder / "config.json").write_text(json.dumps(fields))
    torch.save(held | {"model.layers.0.mlp.router.weight": held["lm_head.weight"]}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no place"):
        lowbit.AutoModelForCausalLM.load_low_bit(folder, allow_pickle=True)
