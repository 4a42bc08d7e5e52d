"""The container, the block types and the bad files.

Types the `gguf` package can quantise are written and read back; for k-quants, which it cannot, random blocks are
decoded by formulas written out one number at a time from the layout in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from interop.gguf_writing import QUANTISABLE, byte_level_vocabulary, rotary_pairs, write_gguf
from lowbit.errors import CheckpointError, MissingPackageError
from lowbit.interop.gguf import GgufModel, open_gguf, write_hf_folder
from lowbit.interop.gguf_container import BLOCK_TYPES, decode_blocks, read_container, round_to

WIDTH, HEADS, KEY_HEADS = 256, 4, 2
METADATA = {
    "block_count": 1,
    "embedding_length": WIDTH,
    "feed_forward_length": WIDTH,
    "context_length": 64,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KEY_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def llama_tensors(seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """One layer of a Llama in GGUF's names, [out, in]; queries and keys not yet in rotary pairs."""
    random = np.random.default_rng(seed)
    key_rows = WIDTH // HEADS * KEY_HEADS
    rows = {"attn_q": WIDTH, "attn_k": key_rows, "attn_v": key_rows, "attn_output": WIDTH}
    rows |= {"ffn_gate": WIDTH, "ffn_up": WIDTH, "ffn_down": WIDTH}
    tensors = {f"blk.0.{name}.weight": random.normal(0, 0.05, (count, WIDTH)) for name, count in rows.items()}
    tensors["token_embd.weight"] = random.normal(0, 0.05, (300, WIDTH))
    tensors |= {name: random.normal(1, 0.05, WIDTH) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")}
    tensors["output_norm.weight"] = random.normal(1, 0.05, WIDTH)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_llama(path: Path, type_name: str = "F32", **metadata: Any) -> Path:
    tensors = llama_tensors()
    for name, heads in (("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", KEY_HEADS)):
        tensors[name] = rotary_pairs(tensors[name], heads)
    return write_gguf(path, "llama", METADATA | byte_level_vocabulary() | metadata, tensors, type_name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "llama.gguf", "Q8_0")


def test_block_types_are_those_of_the_package() -> None:
    sizes = {int(kind): (kind.name, *shape) for kind, shape in gguf.GGML_QUANT_SIZES.items()}
    assert {code: (t.name, t.block_elements, t.block_bytes) for code, t in BLOCK_TYPES.items()} == sizes


@pytest.mark.parametrize("type_name", QUANTISABLE)
def test_every_type_the_package_writes(tmp_path: Path, type_name: str) -> None:
    model = open_gguf(write_llama(tmp_path / "x.gguf", type_name))
    kind = gguf.GGMLQuantizationType[type_name]
    for stem, hf in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("ffn_up", "mlp.up_proj")):
        # A row is quantised by itself, so quantising the rows in Hugging Face's order gives the bytes to expect.
        packed = gguf.quants.quantize(llama_tensors()[f"blk.0.{stem}.weight"], kind)
        tensor = model.tensors[f"model.layers.0.{hf}.weight"]
        assert tensor.type_name == type_name and tensor.shape == llama_tensors()[f"blk.0.{stem}.weight"].shape
        np.testing.assert_array_equal(tensor.raw(), packed.view(np.uint8))
        np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(packed, kind))


def dequantised(kind: gguf.GGMLQuantizationType, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32] | None:
    """What the package makes of the bytes of a type, or None where it makes nothing."""
    try:
        return gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        return None


@pytest.mark.parametrize("type_name", sorted({t.name for t in gguf.GGML_QUANT_SIZES} - {*QUANTISABLE, "F64"}))
def test_every_other_type_is_read_as_the_package_reads_it_or_refused(tmp_path: Path, type_name: str) -> None:
    """Types without a quantiser in the package, the IQ types for one: bytes of any value, small enough for finite scales."""
    kind = gguf.GGMLQuantizationType[type_name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 40, (WIDTH, WIDTH // elements * size), np.uint8)
    name = "blk.0.ffn_up.weight"
    tensors = {**llama_tensors(), name: raw}
    path = write_gguf(
        tmp_path / "x.gguf", "llama", METADATA | byte_level_vocabulary(), tensors, blocks={name: (type_name, raw)}
    )
    expected = dequantised(kind, raw)
    tensor = open_gguf(path).tensors["model.layers.0.mlp.up_proj.weight"]
    if expected is None:
        with pytest.raises(CheckpointError, match=f"of type {type_name} cannot be read"):
            tensor.read()
    else:
        np.testing.assert_array_equal(tensor.read(), expected)


def half(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block, np.float16, 1, at)[0])


def six_bit_pair(scales: bytes, j: int) -> tuple[int, int]:
    """The j-th scale and minimum of Q4_K and Q5_K, 6 bits each, of 12 bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4, (scales[j + 4] >> 4) | (scales[j] >> 6) << 4


def q2_k(block: bytes, i: int) -> float:
    byte = 16 + 32 * (i // 128) + i % 32
    q = block[byte] >> 2 * (i % 128 // 32) & 3
    scale = block[i // 16]
    return half(block, 80) * (scale & 15) * q - half(block, 82) * (scale >> 4)


def q3_k(block: bytes, i: int) -> float:
    low = block[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    high = block[i % 32] >> i // 32 & 1
    scales, j = block[96:108], i // 16
    four = scales[j % 8] >> 4 * (j // 8) & 15
    two = scales[8 + j % 4] >> 2 * (j // 4) & 3
    return half(block, 108) * ((four | two << 4) - 32) * (low - (0 if high else 4))


def q4_k(block: bytes, i: int) -> float:
    scale, minimum = six_bit_pair(block[4:16], i // 32)
    q = block[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
    return half(block, 0) * scale * q - half(block, 2) * minimum


def q5_k(block: bytes, i: int) -> float:
    scale, minimum = six_bit_pair(block[4:16], i // 32)
    low = block[48 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
    high = block[16 + i % 32] >> i // 32 & 1
    return half(block, 0) * scale * (low | high << 4) - half(block, 2) * minimum


def q6_k(block: bytes, i: int) -> float:
    part, r = i // 128, i % 128
    low = block[64 * part + r % 64] >> 4 * (r // 64) & 15
    high = block[128 + 32 * part + r % 32] >> 2 * (r // 32) & 3
    scale = np.frombuffer(block, np.int8, 16, 192)[i // 16]
    return half(block, 208) * int(scale) * ((low | high << 4) - 32)


@pytest.mark.parametrize(
    ("type_name", "decode", "halves"),
    [
        ("Q2_K", q2_k, (80, 82)),
        ("Q3_K", q3_k, (108,)),
        ("Q4_K", q4_k, (0, 2)),
        ("Q5_K", q5_k, (0, 2)),
        ("Q6_K", q6_k, (208,)),
    ],
)
def test_k_quants_by_the_formula(tmp_path: Path, type_name: str, decode: Any, halves: tuple[int, ...]) -> None:
    kind = next(t for t in BLOCK_TYPES.values() if t.name == type_name)
    random = np.random.default_rng(7)
    rows, blocks = 3, 2
    packed = random.integers(0, 256, (rows, blocks, kind.block_bytes), np.uint8)
    for at in halves:  # random bytes could be NaN as fp16
        packed[..., at : at + 2] = random.normal(0, 0.1, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    expected = [[decode(packed[r, i // 256].tobytes(), i % 256) for i in range(blocks * 256)] for r in range(rows)]

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", packed.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = read_container(path).entries["w"]
    assert entry.shape == (rows, blocks * 256)
    numbers = decode_blocks(entry.data, entry.type, "float32").reshape(entry.shape)
    np.testing.assert_allclose(numbers, np.array(expected), rtol=1e-5, atol=1e-6)


def test_bfloat16_rounds_to_nearest_even() -> None:
    halfway = np.array(
        [1.00390625, 1.01171875, 1.0, -1.00390625], np.float32
    )  # 1 + 1/256 is halfway between two bfloat16
    back = (round_to(halfway, "bfloat16").astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(back, np.array([1.0, 1.015625, 1.0, -1.0], np.float32))
    odd = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal((round_to(odd, "bfloat16").astype(np.uint32) << 16).view(np.float32), odd)
    low_payload = np.array([0x7F800001], np.uint32).view(np.float32)  # a NaN whose upper half alone would be infinity
    assert np.isnan((round_to(low_payload, "bfloat16").astype(np.uint32) << 16).view(np.float32)).all()


def test_sixteen_bit_reads_are_rounded_fp32_reads(llama: Path) -> None:
    for tensor in open_gguf(llama).tensors.values():
        exact = tensor.read("float32")
        np.testing.assert_array_equal(tensor.read(np.float16), exact.astype(np.float16))
        np.testing.assert_array_equal(tensor.read("torch.bfloat16"), round_to(exact, "bfloat16"))
    with pytest.raises(CheckpointError, match="not as 'int8'"):
        tensor.read("int8")


def test_config(llama: Path) -> None:
    model = open_gguf(llama)
    expected = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "vocab_size": 300}
    expected |= {"num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    expected |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "pad_token_id": None}
    assert expected.items() <= model.config.items()
    assert model.architecture == "llama"
    assert "lm_head.weight" not in model.tensors


def test_generation_config_names_every_end(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.eot_token_id": 5, "general.sampling.temp": 0.5}
    config = open_gguf(write_llama(tmp_path / "x.gguf", **extra)).generation_config
    assert config["eos_token_id"] == [byte_level_vocabulary()["tokenizer.ggml.eos_token_id"], 5]
    assert config["do_sample"] is True and config["temperature"] == 0.5


def test_split_files_are_one_model(tmp_path: Path) -> None:
    tensors = llama_tensors()
    names = sorted(tensors)
    split = {"split.count": 2, "split.tensors.count": len(names)}
    first, second = {n: tensors[n] for n in names[:5]}, {n: tensors[n] for n in names[5:]}
    path = write_gguf(tmp_path / "m-00001-of-00002.gguf", "llama", METADATA | byte_level_vocabulary() | split, first)
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf does not exist"):
        open_gguf(path)
    other = write_gguf(tmp_path / "m-00002-of-00002.gguf", "llama", split, second)
    assert len(open_gguf(path).tensors) == len(names)
    with pytest.raises(CheckpointError, match="open the first"):
        open_gguf(other)


# --- bad files: each ends in one clear sentence


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file"])
def test_wrong_magic(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        open_gguf(tmp_path / "x.gguf")


def test_other_version(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(32))
    with pytest.raises(CheckpointError, match="version 1"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.5, 0.999])
def test_truncated(llama: Path, tmp_path: Path, share: float) -> None:
    content = llama.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[: max(8, int(len(content) * share))])
    with pytest.raises(CheckpointError, match="is truncated"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["attention.head_count", "block_count", "attention.layer_norm_rms_epsilon"])
def test_missing_metadata(tmp_path: Path, key: str) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != key}
    path = write_gguf(tmp_path / "x.gguf", "llama", metadata, llama_tensors())
    with pytest.raises(CheckpointError, match=f"lacks the metadata 'llama.{key}'"):
        assert open_gguf(path).config


def test_missing_layer_and_unknown_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", METADATA | {"block_count": 2}, llama_tensors())
    with pytest.raises(CheckpointError, match="lacks layer 1 of 2"):
        open_gguf(path)
    extra = llama_tensors() | {"blk.0.mystery.weight": np.zeros((2, 2), np.float32)}
    path = write_gguf(tmp_path / "y.gguf", "llama", METADATA, extra)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.mystery\.weight' is no weight that 'llama'"):
        open_gguf(path)


def test_foreign_rope_factors_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)}
    path = write_gguf(tmp_path / "x.gguf", "llama", METADATA, tensors)
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        assert open_gguf(path).config


def test_folder_is_whole_or_absent(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def fail(self: GgufModel) -> str:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(GgufModel, "tokenizer_json", fail)
        with pytest.raises(CheckpointError, match="disk is full"):
            write_hf_folder(llama, out)
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in write_hf_folder(llama, out).iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with pytest.raises(CheckpointError, match="not an empty folder"):
        write_hf_folder(llama, out)


def test_missing_package_names_its_extra(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    tensors = open_gguf(llama).tensors
    assert tensors["model.norm.weight"].read().shape == (WIDTH,)  # F32 needs no package
    with pytest.raises(MissingPackageError, match=r"pip install 'lowbit\[gguf\]'"):
        tensors["model.layers.0.mlp.up_proj.weight"].read()


def test_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from lowbit.interop.gguf import write_hf_folder\n"
        f"print(write_hf_folder({str(llama)!r}, {str(tmp_path / 'out')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
