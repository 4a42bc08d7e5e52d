"""Weights from every form: plain folders, compressed-tensors, lowbit's own, GGUF; rounded on the way; and damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from cpu.gguf_rows import random_rows
from interop.gguf_writing import byte_level_vocabulary, write_gguf
from lowbit.core import calls
from lowbit.errors import CheckpointError, FormatError, LowbitError, RecipeError
from lowbit.interop.gguf import write_hf_folder
from lowbit.recipe import recipe_named
from lowbit.runtime import load, stored
from lowbit.runtime.files import FolderFiles, open_files, read_spec, read_weights
from lowbit.runtime.gguf_blocks import packed_blocks
from lowbit.runtime.loading import load_weights
from lowbit.runtime.mapped import MappedFile, mapped_bytes, release_pages
from lowbit.runtime.weights import PREPARED, prepared
from lowbit_assets import smollm2_gguf, tiny_model, tiny_model_in_memory

IDS = list(range(5, 40))
EXACT = {"cache": "fp32", "compute": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("plain"))


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "format", "method"),
    [
        ("llama", "int4_g32", "compressed-tensors"),
        ("llama", "int3_asym_g32", "compressed-tensors"),
        ("llama", "int4", "lowbit"),
        ("gemma2", "int8_channel", "compressed-tensors"),
        ("mixtral", "int4_g32", "compressed-tensors"),
        ("mixtral", "nf4", "lowbit"),
        ("gpt2", "mxfp4", "lowbit"),
        ("gpt_neox", "int5", "lowbit"),
    ],
)
def test_low_bit_folders_give_what_torch_gives(family: str, format: str, method: str, tmp_path: Path) -> None:
    model = lowbit.optimize_model(tiny_model_in_memory(family), low_bit=format, kernel="reference", embedding=format)
    model.save_low_bit(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    ours = load(tmp_path / "saved", **EXACT)
    assert np.allclose(ours.logits(IDS), torch_logits(model), atol=2e-4)


@pytest.mark.parametrize(
    ("family", "rounder"), [("llama", "rtn"), ("llama", "plain_rtn"), ("qwen2_moe", "rtn"), ("bloom", "rtn")]
)
def test_rounding_while_loading_is_what_torch_rounds(family: str, rounder: str, tmp_path: Path) -> None:
    folder, recipe = tiny_model(family, tmp_path / "plain"), recipe_named("int4").replace(rounder=rounder)
    model = lowbit.optimize_model(tiny_model_in_memory(family), recipe=recipe)
    model.save_low_bit(tmp_path / "saved")
    on_the_way, saved = load(folder, format=recipe, **EXACT), load(tmp_path / "saved", **EXACT)
    assert np.array_equal(on_the_way.logits(IDS), saved.logits(IDS))


def test_algorithms_that_need_torch_or_data_are_refused(tmp_path: Path) -> None:
    folder, recipe = tiny_model("llama", tmp_path / "plain"), recipe_named("int4_g32")
    for rounder, said in (
        ("hqq", "rounds in torch"),
        ("clip_rtn", "rounds in torch"),
        ("gptq", "looks at activations"),
    ):
        with pytest.raises(RecipeError, match=f"{rounder} {said}.* 'lowbit quantize' first"):
            load(folder, format=recipe.replace(rounder=rounder), **EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_folders_and_shards(dtype: str, tmp_path: Path) -> None:
    model = tiny_model_in_memory("llama").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    # Not model.float(): casting to 16 bits has rounded its rotary frequencies, which are no weights and are not saved.
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert np.allclose(load(tmp_path, **EXACT).logits(IDS), torch_logits(reference), atol=1e-4)


def test_tied_heads_share_one_weight(tmp_path: Path) -> None:
    model = tiny_model_in_memory("llama", tie_word_embeddings=True)
    lowbit.optimize_model(model, low_bit="int4_g32", embedding="int4_g32", kernel="reference")
    model.save_low_bit(tmp_path / "saved")
    files = open_files(tmp_path / "saved")
    spec = read_spec(files)
    weights = load_weights(files, spec)
    assert spec.head.tied and ("head", None) not in weights.matrices
    assert weights.matrices["embedding", None].kind == PREPARED
    assert np.allclose(load(tmp_path / "saved", **EXACT).logits(IDS), torch_logits(model), atol=2e-4)


def test_pages_of_a_file_go_back_and_other_memory_does_not(tmp_path: Path) -> None:
    numbers = torch.arange(1 << 20, dtype=torch.int32)
    save_file({"codes": numbers}, tmp_path / "one.safetensors")
    file = MappedFile(tmp_path / "one.safetensors")
    view = file.tensors["codes"].view()
    assert mapped_bytes(view) == 4 << 20 and mapped_bytes(view.reshape(64, -1)[:32]) == 2 << 20
    for own in (view.copy(), np.frombuffer(bytearray(64), np.uint8), np.zeros(9)):
        assert mapped_bytes(own) == 0
    assert view.sum(dtype=np.int64) and resident(view) > 900  # pages of 4 KiB
    release_pages(view)
    assert resident(view) == 0
    assert np.array_equal(view, numbers.numpy())


def resident(array: np.ndarray) -> int:
    """Pages of an array that are in this process's tables."""
    with Path("/proc/self/pagemap").open("rb") as table:
        first, last = array.ctypes.data // 4096 + 1, (array.ctypes.data + array.nbytes) // 4096
        table.seek(first * 8)
        return int((np.frombuffer(table.read((last - first) * 8), np.uint64) >> np.uint64(63)).sum())


def test_loading_gives_back_what_it_has_read(tmp_path: Path) -> None:
    """Codes and scales of packed weights, which are laid out anew; what is plain stays in the file."""
    model = tiny_model_in_memory("llama", hidden_size=512, intermediate_size=1024)
    lowbit.optimize_model(model, low_bit="int4_g32").save_low_bit(tmp_path / "saved")
    files = open_files(tmp_path / "saved")
    begun: list[int] = []
    weights = load_weights(files, read_spec(files), before=lambda: begun.append(1))
    assert begun == [1] and weights.nbytes > 0
    assert isinstance(files, FolderFiles)
    for name, tensor in files.tensors.items():
        if name.endswith(("weight_packed", "weight_scale")):
            assert resident(tensor.view()) == 0, name


def test_a_tokenizer_that_is_damaged_is_told_in_the_end(folder: Path, tmp_path: Path) -> None:
    """It is read beside the weights, and must not end in its thread."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    for format in (None, "int4"):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
            load(tmp_path, format=format)


def test_loose_codes_of_older_compressed_tensors(tmp_path: Path) -> None:
    """3-bit codes used to lie ten to a word, with two bits of each unused."""
    model = lowbit.optimize_model(tiny_model_in_memory("llama"), low_bit="int3_g32")
    model.save_low_bit(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "loose")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        rows, columns = tensors[name.replace("weight_packed", "weight_shape")].tolist()
        values = lowbit_unpack(tensors[name].numpy(), 3, columns)
        padded = np.pad(values, ((0, 0), (0, -columns % 10))).reshape(rows, -1, 10).astype(np.uint32)
        words = (padded << (3 * np.arange(10, dtype=np.uint32))).sum(-1, dtype=np.uint32)
        tensors[name] = torch.from_numpy(words.view(np.int32))
    save_file(tensors, tmp_path / "loose" / "model.safetensors")
    assert np.array_equal(load(tmp_path / "loose").logits(IDS), load(tmp_path / "dense").logits(IDS))


def lowbit_unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")[:, : count * bits]
    return (stream.reshape(len(words), count, bits) << np.arange(bits)).sum(-1).astype(np.uint8)


# --- GGUF ------------------------------------------------------------------------------------------------------------


HELD_KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", HELD_KINDS)
def test_blocks_become_packed_weights_number_for_number(kind: str) -> None:
    blocks = random_rows(kind, 48, 512)
    packed = packed_blocks(blocks, kind, 512)
    assert packed is not None
    exact = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(48, 512)
    assert np.array_equal(stored.dequantize(packed).array, exact)
    matrix = prepared(packed)
    assert matrix.bytes <= 2048 + 1.04 * blocks.nbytes  # the header, and scales of six bits in bytes
    ids, rows = np.arange(48), np.empty((48, 512), np.float32)
    calls.read_rows(matrix.address, matrix.bytes, ids.ctypes.data, 48, rows.ctypes.data)
    assert np.array_equal(rows, exact)


def test_a_file_with_every_type_is_held_as_stored(tmp_path: Path) -> None:
    width, matrices = 256, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{matrix}.weight" for layer in range(2) for matrix in matrices] + ["token_embd.weight"]
    rows = {name: 300 if name == "token_embd.weight" else width for name in names}
    kinds = dict(zip(names, (HELD_KINDS * 2)[: len(names)], strict=True))
    blocks = {name: (kind, random_rows(kind, rows[name], width)) for name, kind in kinds.items()}
    norms = ["output_norm.weight", *(f"blk.{i}.{n}_norm.weight" for i in range(2) for n in ("attn", "ffn"))]
    tensors = {name: np.ones(width, np.float32) for name in norms} | {n: np.empty((rows[n], width)) for n in names}
    sizes = {"block_count": 2, "embedding_length": width, "feed_forward_length": width, "context_length": 64}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    metadata = sizes | heads | byte_level_vocabulary()
    path = write_gguf(tmp_path / "all.gguf", "llama", metadata, tensors, blocks=blocks)
    held = load(path, **EXACT)
    assert not held.notes
    plain = load(write_hf_folder(path, tmp_path / "plain", "float32"), **EXACT)
    assert np.allclose(held.logits(IDS), plain.logits(IDS), atol=1e-4 * np.abs(plain.logits(IDS)).max())


def test_blocks_without_an_equal_are_left_to_the_caller() -> None:
    assert packed_blocks(np.zeros((4, 66), np.uint8), "TQ2_0", 256) is None


@pytest.mark.slow
def test_a_gguf_file_is_close_to_its_numbers(tmp_path: Path) -> None:
    plain = load(write_hf_folder(smollm2_gguf(), tmp_path / "plain", "float32"), **EXACT)
    ours = load(smollm2_gguf(), **EXACT)
    prompt = plain.tokenizer.encode("The capital of France is the city of Paris, and the capital of Italy is Rome.")
    assert ours.tokenizer.encode("The capital") == plain.tokenizer.encode("The capital")
    expected, found = (torch.from_numpy(m.logits(prompt)).log_softmax(-1) for m in (plain, ours))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-6
    assert not ours.notes  # nothing was converted


# --- memory ----------------------------------------------------------------------------------------------------------


def test_plain_weights_stay_in_the_file_and_packed_ones_are_laid_out_once(folder: Path) -> None:
    files = open_files(folder)
    spec = read_spec(files)
    plain = load_weights(files, spec)
    q = plain.matrices["q", 0]
    view = files.read("model.layers.0.self_attn.q_proj.weight", 64)
    assert q.address == view.array.ctypes.data  # type: ignore[union-attr]
    packed = load_weights(files, spec, recipe_named("int4_g32"))
    assert packed.matrices["q", 0].kind == PREPARED
    assert packed.nbytes < plain.nbytes / 2


# --- what is wrong with a folder -------------------------------------------------------------------------------------


def without_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def other_sizes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 64)
    save_file(tensors, folder / "model.safetensors")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def config_of(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weight, "the checkpoint lacks model.layers.1.mlp.up_proj.weight"),
        (other_sizes, r"has the shape \[8, 64\], and by config.json the k weight of this model has \[32, 64\]"),
        (truncated, "is truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "is truncated or no safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (config_of(model_type=""), "names no model_type"),
        (config_of(model_type="bert"), "lowbit has no engine for models of type 'bert'"),
        (config_of(quantization_config={"quant_method": "gptq"}), "the folder is quantised with gptq"),
    ],
    ids=["weight", "sizes", "truncated", "short", "none", "config", "json", "type", "family", "gptq"],
)
def test_damage_is_said(damage: Callable[[Path], object], message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(LowbitError, match=message):
        load(tmp_path / "copy")


def test_a_file_cut_off_under_the_map_is_said(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    model = load(tmp_path / "copy")
    assert len(model.generate(IDS, max_new_tokens=2, ignore_end=True).tokens) == 2
    os.truncate(tmp_path / "copy" / "model.safetensors", 8192)
    for use in (model.generate, model.logits, model.embed):
        with pytest.raises(CheckpointError, match="was truncated to 8192 bytes while it was in use"):
            use(IDS)


def smallest_gguf(path: Path) -> Path:
    width, names = 64, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}.weight": (width, width) for name in names} | {"token_embd.weight": (300, width)}
    norms = ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]
    tensors = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    tensors |= {name: np.ones(width, np.float32) for name in norms}
    sizes = {"block_count": 1, "embedding_length": width, "feed_forward_length": width, "context_length": 64}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    return write_gguf(path, "llama", sizes | heads | byte_level_vocabulary(), tensors)


IN_THE_MIDDLE = """
import os, sys
import numpy as np
from lowbit.errors import LowbitError
from lowbit.runtime import load
from lowbit.runtime.files import open_files
from lowbit.runtime.loading import load_files

model, weights, copy, half = sys.argv[1:4] + [os.path.getsize(sys.argv[2]) // 2]

def said(use):
    try:
        use()
    except LowbitError as error:
        assert "was truncated" in str(error) and "while it was in use" in str(error), error
        return True

loaded = load(model)
engine, prompt = loaded.engine, list(range(5, 25))
expected = engine.prefill(prompt)
if weights != model:  # what GGUF has was copied
    stream = loaded.stream(prompt, max_new_tokens=20, ignore_end=True)
    next(stream)
    os.truncate(weights, half)
    assert said(lambda: list(stream)) and said(lambda: loaded.generate(prompt))
    engine.reset()
    assert said(lambda: engine.prefill(prompt)) and said(lambda: engine.decode(5)) and engine.length() == 0

files = open_files(copy)
os.truncate(copy if os.path.isfile(copy) else copy + "/model.safetensors", half)
assert said(lambda: load_files(files))
other = load(sys.argv[4])
assert np.array_equal(other.engine.prefill(prompt), expected)
print("still here")
"""


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_file_cut_off_while_it_is_read_ends_no_process(kind: str, folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which was ended by the system before maps were guarded. Between two tokens of one answer, and
    while a model is loaded; other models of the process go on."""
    copies = [tmp_path / f"{name}.{kind}" for name in ("used", "loaded", "other")]
    for copy in copies:
        if kind == "gguf":
            smallest_gguf(copy)
        else:
            shutil.copytree(folder, copy)
    weights = copies[0] if kind == "gguf" else copies[0] / "model.safetensors"
    code = [sys.executable, "-c", IN_THE_MIDDLE, *map(str, (copies[0], weights, copies[1], copies[2]))]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "still here"), done.stderr


@pytest.mark.parametrize("how", ["other.read()", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_what_is_not_ours_still_ends_the_process(how: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(20000))
    code = (
        "import mmap, os, signal, sys\n"
        "from lowbit.runtime import load\n"
        "model = load(sys.argv[1])\n"
        "with open(sys.argv[2], 'rb') as file: other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        f"os.truncate(sys.argv[2], 100)\n{how}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "other")], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_paths_that_are_no_model_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        load(tmp_path / "absent")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no model folder and no \.gguf file"):
        load(tmp_path / "file.txt")
    (tmp_path / "bad.gguf").write_bytes(b"GGUFxxxxxxxxxx")
    with pytest.raises(CheckpointError, match="GGUF"):
        load(tmp_path / "bad.gguf")


def test_formats_that_cannot_be_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown format"):
        load(folder, format="int99")
    with pytest.raises(RecipeError, match="the engine cannot make q4_k"):
        load(folder, format="q4_k")
    lowbit.optimize_model(tiny_model_in_memory("llama"), low_bit="nf4").save_low_bit(tmp_path / "saved")
    with pytest.raises(RecipeError, match="is low-bit already"):
        load(tmp_path / "saved", format="int4")


def test_every_weight_is_read_once(folder: Path) -> None:
    files = open_files(folder)
    spec = read_spec(files)
    keys = [(loaded.role, loaded.layer) for loaded in read_weights(files, spec)]
    assert len(keys) == len(set(keys)) == len(spec.outer_weights()) + sum(len(spec.layer_weights(i)) for i in range(2))


def test_transformers_reads_what_we_read(folder: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert np.allclose(load(folder, **EXACT).logits(IDS), torch_logits(reference), atol=1e-4)
