"""The exporter by itself: without torch, and within the memory that its page names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit_assets import tiny_model
from lowbit_assets.tiny import write_byte_tokenizer

WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"


def ran(code: str, *arguments: str) -> str:
    line = [sys.executable, "-c", f"{WITHOUT_TORCH}\n{code}", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# A process's peak begins with the size of the one that started it: a small one does, and says what it saw.
STARTER = (
    "import resource, subprocess, sys\n"
    "code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
    "sys.exit(code)"
)
HIDDEN, INNER, LAYERS = 1024, 4096, 8
LAYER = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) * 2  # bytes of it in the source
# What the allocator and the pages between two weights come to.
SLACK = 16 << 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")
    write_byte_tokenizer(folder)
    return folder


def test_a_folder_is_written_without_torch(tiny: Path, tmp_path: Path) -> None:
    code = (
        "from lowbit.openvino import write_decoder\n"
        "print(write_decoder(sys.argv[1], sys.argv[2], 'int4_g32', ratio=0.8, tokenizer=False).report.formats())"
    )
    assert "int4_g32" in ran(code, str(tiny), str(tmp_path / "out"))
    command = "from lowbit.cli import main\nsys.exit(main(sys.argv[1:]))"
    made = ran(command, "export", "openvino", "--model", str(tiny), "--format", "int4_g32", str(tmp_path / "ov"))
    assert "written to" in made and "against the source" in made
    # A process of its own has converted the tokenizer, which takes transformers.
    assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml"} <= {file.name for file in (tmp_path / "ov").iterdir()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """134 million weights in bf16: layers of 34 MB."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 256,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (256, HIDDEN), "lm_head": (256, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        inside = dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), (HIDDEN, HIDDEN))
        inside |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
        inside |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,))
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in inside.items()}
    numbers = torch.randn(HIDDEN * INNER, generator=torch.Generator().manual_seed(0)).bfloat16()
    # None like another: OpenVINO writes equal constants once.
    state = {
        f"{name}.weight": numbers.roll(place)[: torch.Size(shape).numel()].clone().view(shape)
        for place, (name, shape) in enumerate(shapes.items())
    }
    save_file(state, folder / "model.safetensors")
    yield folder
    (folder / "model.safetensors").unlink()


def peak(source: Path, out: Path, format: str | None, keep: bool) -> int:
    """The most memory of a process that exports a model."""
    call = f"write_decoder(*sys.argv[1:], {format!r}, tokenizer=False, keep={keep})"
    code = f"{WITHOUT_TORCH}\nfrom lowbit.openvino import write_decoder\n{call}"
    line = [sys.executable, "-I", "-S", "-c", STARTER, sys.executable, "-c", code, str(source), str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pages of a file are given back on Linux alone")
@pytest.mark.parametrize(("format", "keep"), [(None, False), ("int8", True)])
def test_memory_peaks_at_what_is_written_and_one_layer(
    tiny: Path, large: Path, tmp_path: Path, format: str | None, keep: bool
) -> None:
    """Whether the codes are kept for a comparison or not: those lie on the disk."""
    before = peak(tiny, tmp_path / "tiny", format, keep)
    found = peak(large, tmp_path / "large", format, keep) - before
    graph = (tmp_path / "large" / "openvino_model.bin").stat().st_size
    assert graph >= LAYERS * LAYER / (1 if format is None else 2)
    assert graph / 2 < found < graph + LAYER + SLACK
    (tmp_path / "large" / "openvino_model.bin").unlink()
