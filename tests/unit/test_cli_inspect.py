"""`lowbit inspect`: every project's checkpoints from their headers, damage told apart, no torch."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lowbit.cli import FAILED, OK, main
from lowbit.report import LayerReport, Report

Arrays = dict[str, NDArray[Any]]
OUT, IN = 96, 128


def folder_of(path: Path, tensors: Arrays, quantization: dict[str, Any] | None = None) -> Path:
    """A model folder of one file with these tensors and a norm."""
    path.mkdir(exist_ok=True)
    save_file(tensors | {"model.norm.weight": np.ones(IN, np.float16)}, path / "model.safetensors")
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    return path


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `inspect --json` prints."""
    assert main(["inspect", str(path), "--json"]) == OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def only_layer(found: dict[str, Any]) -> dict[str, Any]:
    """The one weight beside the norm."""
    layers = [layer for layer in found["layers"] if layer["path"] != "model.norm"]
    assert len(layers) == 1, layers
    return dict(layers[0])


def zeros(*shape: int, dtype: str = "int32") -> NDArray[Any]:
    return np.zeros(shape, dtype)


def bytes_of(text: str) -> NDArray[Any]:
    return np.frombuffer(text.encode(), np.uint8)


def plain() -> tuple[Arrays, None]:
    return {"p.weight": zeros(OUT, IN, dtype="float32")}, None


def compressed() -> tuple[Arrays, dict[str, Any]]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 32, "symmetric": False}}
    tensors = {
        "p.weight_packed": zeros(OUT, IN * 3 // 32),
        "p.weight_scale": zeros(OUT, IN // 32, dtype="float16"),
        "p.weight_zero_point": zeros(OUT * 3 // 32, IN // 32),
        "p.weight_shape": np.array([OUT, IN]),
    }
    return tensors, {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def compressed_tail() -> tuple[Arrays, dict[str, Any]]:
    """100 inputs in groups of 64: the last is shorter, the last word is not full."""
    tensors = {
        "p.weight_packed": zeros(OUT, 13),
        "p.weight_scale": zeros(OUT, 2, dtype="float32"),
        "p.weight_shape": np.array([OUT, 100]),
    }
    return tensors, {"quant_method": "compressed-tensors"}


def gptq() -> tuple[Arrays, dict[str, Any]]:
    tensors = {
        "p.qweight": zeros(IN // 8, OUT),
        "p.qzeros": zeros(IN // 64, OUT // 8),
        "p.scales": zeros(IN // 64, OUT, dtype="float16"),
        "p.g_idx": zeros(IN),
    }
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}


def awq() -> tuple[Arrays, dict[str, Any]]:
    tensors = {
        "p.qweight": zeros(IN, OUT // 8),
        "p.qzeros": zeros(IN // 32, OUT // 8),
        "p.scales": zeros(IN // 32, OUT, dtype="float16"),
    }
    return tensors, {"quant_method": "awq", "bits": 4, "group_size": 32}


def bnb() -> tuple[Arrays, dict[str, Any]]:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [OUT, IN], "nested_blocksize": 256})
    tensors = {
        "p.weight": zeros(OUT * IN // 2, 1, dtype="uint8"),
        "p.weight.absmax": zeros(OUT * IN // 64, dtype="uint8"),
        "p.weight.quant_map": zeros(16, dtype="float32"),
        "p.weight.nested_absmax": zeros(1, dtype="float32"),
        "p.weight.nested_quant_map": zeros(256, dtype="float32"),
        "p.weight.quant_state.bitsandbytes__nf4": bytes_of(state),
    }
    return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def bnb_int8() -> tuple[Arrays, dict[str, Any]]:
    tensors = {"p.weight": zeros(OUT, IN, dtype="int8"), "p.SCB": zeros(OUT, dtype="float32")}
    return tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def mxfp4() -> tuple[Arrays, dict[str, Any]]:
    tensors = {
        "p_blocks": zeros(4, OUT, IN // 32, 16, dtype="uint8"),
        "p_scales": zeros(4, OUT, IN // 32, dtype="uint8"),
    }
    return tensors, {"quant_method": "mxfp4"}


def own(format: str) -> tuple[Arrays, dict[str, Any]]:
    return {}, {"quant_method": "lowbit", "layers": {format: ["p"]}}


def own_nf3() -> tuple[Arrays, dict[str, Any]]:
    tensors = {
        "p.packed_weight.codes": zeros(OUT, IN * 3 // 32),
        "p.packed_weight.scales": zeros(OUT, IN // 64, dtype="float16"),
    }
    return tensors, own("nf3")[1]


def own_kquant() -> tuple[Arrays, dict[str, Any]]:
    return {"p.packed_weight.codes": zeros(OUT, 144, dtype="uint8")}, own("q4_k")[1]


@pytest.mark.parametrize(
    ("make", "format", "shape"),
    [
        (plain, "float32", [OUT, IN]),
        (compressed, "int3_asym_g32", [OUT, IN]),
        (compressed_tail, "int4_fp32", [OUT, 100]),
        (gptq, "int4", [OUT, IN]),
        (awq, "int4_asym_g32", [OUT, IN]),
        (bnb, "nf4_dq", [OUT, IN]),
        (bnb_int8, "int8", [OUT, IN]),
        (mxfp4, "mxfp4", [4, OUT, IN]),
        (own_nf3, "nf3", [OUT, IN]),
        (own_kquant, "q4_k", [OUT, 256]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_layouts(
    make: Callable[[], tuple[Arrays, dict[str, Any] | None]],
    format: str,
    shape: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors, quantization = make()
    found = inspected(folder_of(tmp_path, tensors, quantization), capsys)
    layer = only_layer(found)
    stored = sum(array.nbytes for array in tensors.values())
    assert (layer["path"], layer["format"], layer["shape"]) == ("p", format, shape)
    assert layer["bytes"] == stored
    assert found["bytes"] == stored + IN * 2  # the norm
    assert found["weights"] == layer["weights"] + IN
    assert found["quant_method"] == (quantization or {}).get("quant_method")


def test_shape_of_a_padded_row_comes_from_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"p.packed_weight.codes": zeros(OUT, 13), "p.packed_weight.scales": zeros(OUT, 2, dtype="float16")}
    folder_of(tmp_path, tensors, own("nf4")[1])
    assert only_layer(inspected(tmp_path, capsys))["shape"] == [OUT, 104]
    row = LayerReport("p", "linear", "nf4", [OUT, 100], 2 * OUT * 100, OUT * 56, 0.1)
    (tmp_path / "lowbit_report.json").write_text(Report(layers=[row]).to_json())
    assert only_layer(inspected(tmp_path, capsys))["shape"] == [OUT, 100]


def test_a_torch_module_of_ones_own_says_its_formats_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, quantization = own_nf3()
    folder_of(tmp_path, tensors)
    (tmp_path / "config.json").unlink()
    (tmp_path / "lowbit.json").write_text(json.dumps(quantization))
    found = inspected(tmp_path, capsys)
    assert (found["quant_method"], only_layer(found)["format"]) == ("lowbit", "nf3")
    assert main(["generate", str(tmp_path), "--prompt", "Hi"]) == FAILED
    assert "holds a torch module of yours and no language model: load it in Python" in capsys.readouterr().err


def test_one_file_of_a_folder_is_what_the_folder_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path, *compressed())
    file, folder = inspected(tmp_path / "model.safetensors", capsys), inspected(tmp_path, capsys)
    assert {**file, "path": ""} == {**folder, "path": ""} and file["model_type"] == "llama"


def test_settings_of_older_tools_lie_in_their_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, quantization = gptq()
    folder_of(tmp_path, tensors)
    (tmp_path / "quantize_config.json").write_text(json.dumps(quantization))
    assert inspected(tmp_path, capsys)["quant_method"] == "gptq"


def test_layers_that_differ_in_their_number_share_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj.weight": zeros(OUT, IN, dtype="float16") for i in range(12)}
    folder_of(tmp_path, layers)
    assert main(["inspect", str(tmp_path)]) == OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "up_proj" in line]
    assert lines == [["model.layers.*.mlp.up_proj", "12", "float16", f"{OUT}x{IN}", "16.00", "294.9", "kB"]]
    assert main(["inspect", str(tmp_path), "--all"]) == OK
    assert capsys.readouterr().out.count("up_proj") == 12


def shards(path: Path) -> Path:
    """A folder of two files and their index."""
    path.mkdir()
    weight_map = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"layers.{number}.weight": zeros(OUT, IN, dtype="float16")}, path / name)
        weight_map[f"layers.{number}.weight"] = name
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_shards_are_read_through_their_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(shards(tmp_path / "model"), capsys)
    assert (found["files"], len(found["layers"]), found["model_type"]) == (2, 2, None)
    single = inspected(tmp_path / "model" / "model-00001-of-00002.safetensors", capsys)
    assert [layer["path"] for layer in single["layers"]] == ["layers.1"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def spoil_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\xff" + content[9:])


def write_text(path: Path) -> None:
    path.write_text("this is a page that says 404")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "lacks 1 of its 2 files of weights (model-00002-of-00002.safetensors"),
        (cut, "is truncated: it has"),
        (cut_header, "is truncated: it ends inside its header"),
        (spoil_header, "is damaged: its header cannot be read"),
        (write_text, "is no safetensors file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_one_sentence(
    damage: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "model")
    damage(folder / "model-00002-of-00002.safetensors")
    assert main(["inspect", str(folder)]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("lowbit: error: ")


def test_other_files_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled, index, config = tmp_path / "pickled", tmp_path / "index", tmp_path / "config"
    for folder in (pickled, index, config):
        folder.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (index / "model.safetensors.index.json").write_text('{"weights": 1}')
    folder_of(config, {})
    (config / "config.json").write_text("{")
    told = {
        pickled: "are pickles (pytorch_model.bin)",
        index: "is no index",
        config: "is not valid JSON",
        tmp_path: "holds no weights",
        tmp_path / "absent": "there is no file or folder",
        pickled / "pytorch_model.bin": "is no checkpoint",
    }
    for path, sentence in told.items():
        assert main(["inspect", str(path)]) == FAILED
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantization", "report"),
    [
        ({"quant_method": "gptq", "bits": "four"}, None),
        ({"quant_method": "gptq", "config_groups": {"group_0": "all"}}, None),
        ({"quant_method": "lowbit", "layers": {"int4": 5}}, None),
        ({"quant_method": "gptq", "bits": 0}, None),
        ({"quant_method": "gptq"}, {"layers": [{"path": "p"}]}),
    ],
    ids=["bits", "groups", "layers", "zero", "report"],
)
def test_settings_of_another_kind_are_one_sentence(
    quantization: dict[str, Any], report: dict[str, Any] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"p.qweight": zeros(IN // 8, OUT), "p.scales": zeros(2, OUT, dtype="float16")}
    folder = folder_of(tmp_path / "model", tensors, quantization)
    if report is not None:
        (folder / "lowbit_report.json").write_text(json.dumps(report))
    assert main(["inspect", str(folder)]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "damaged" in lines[0] and lines[0].startswith("lowbit: error: ")


def gguf_file(path: Path) -> Path:
    """The smallest GGUF: an architecture and one Q8_0 tensor of two rows of 32."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    info = text("blk.0.ffn_up.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pairs + info
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(2 * 34))
    return path


def test_gguf_is_listed_in_its_own_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(gguf_file(tmp_path / "model.gguf"), capsys)
    layer = {
        "path": "blk.0.ffn_up",
        "format": "q8_0",
        "shape": [2, 32],
        "bytes": 68,
        "weights": 64,
        "bits_per_weight": 8.5,
    }
    assert (found["layers"], found["model_type"], found["quant_method"]) == ([layer], "llama", "gguf")
    assert inspected(tmp_path, capsys)["layers"] == [layer]


def test_inspect_imports_no_torch(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", plain()[0])
    gguf = gguf_file(tmp_path / "model.gguf")
    program = (
        "import sys\nfrom lowbit.cli import main\n"
        f"codes = [main(['inspect', path]) for path in ({str(folder)!r}, {str(gguf)!r})]\n"
        "sys.exit(sum(codes) or 7 * any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (OK, "")
