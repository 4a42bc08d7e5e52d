"""How far is each peer's file from the original, and how far are the recipes of ours that are set against it?

Every row brings the reference model off its grid (see `lowbit_assets.reference`) to one file's weights, dequantised, and
measures the mean KL divergence from the original on the windows of `default_format.py`. Activations stay fp32: what is
compared is what the files hold. Ours are the saved folders that the speed benchmarks load.

SmolLM2's rows of 576 hold no whole block of 256, so llama-quantize puts most of its Q4_K_M into Q5_0 and its head into
Q8_0. A model whose width is a multiple of 256, as the 1.1 B's is, gets the real thing: for it the weights are padded with
zeros to 768 columns, quantised, and cut again ("width 256 n").

    python benchmarks/peers_quality.py --peers DIR             some ten minutes on 2 cores
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from default_format import TEXTS, WINDOW, Bench
from peers.bench import DEFAULT_PEERS
from peers.entries import GROUPS, OUR_RECIPES, WORKERS, our_folder
from safetensors.torch import load_file

from lowbit.evaluate import divergence
from lowbit.interop.gguf import open_gguf
from lowbit.runtime import load
from lowbit_assets import reference_model

MODEL = "smollm2"
GGUF_TYPES = ("Q4_0", "Q4_K_M", "Q8_0")
TORCHAO = "dump_torchao.py"
Weights = dict[str, torch.Tensor]


def gguf_weights(path: Path) -> Weights:
    return {t.name: torch.from_numpy(np.array(t.read("float32"))) for t in open_gguf(path).tensors.values()}


def our_model(folder: Path) -> Any:
    """A saved folder in the engine, rounding nothing but what the file has rounded."""
    return load(folder, context=WINDOW, compute="fp32", cache="fp32")


def dumped(peers: Path, environment: str, script: str, model: Path, *more: str) -> Weights:
    """Weights that a peer's own environment writes out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "weights.safetensors"
        python = peers / environment / "bin" / "python"
        subprocess.run([str(python), str(WORKERS / script), str(model), str(out), *more], check=True)
        return load_file(out)


def candidates(peers: Path) -> Iterator[tuple[str, Any]]:
    """Names as the speed benchmarks know them, and how each is read."""
    models = peers / "models"
    for name, (width, _) in OUR_RECIPES.items():
        if width < 16:
            yield f"lowbit {name}", lambda name=name: our_model(our_folder(models, MODEL, name))
    for kind in GGUF_TYPES:
        yield f"GGUF {kind}", lambda kind=kind: gguf_weights(models / f"{MODEL}-{kind}.gguf")
        if kind != "Q8_0":  # blocks of 32
            yield f"GGUF {kind}, width 256 n", lambda kind=kind: gguf_weights(models / f"{MODEL}-padded-{kind}.gguf")
    for width in (4, 8):
        folder = models / f"openvino-{MODEL}-int{width}"
        yield f"OpenVINO int{width}", lambda folder=folder: dumped(peers, "openvino", "dump_openvino.py", folder)
    yield "ORT int4", lambda: dumped(peers, "ortgenai", "dump_ort.py", models / f"ort-{MODEL}-int4")
    for width in (4, 8):
        told = (f"torchao-int{width}", str(GROUPS[MODEL]))
        yield f"torchao int{width}", lambda told=told: dumped(peers, "torch", TORCHAO, models / f"hf-{MODEL}", *told)


def put(bench: Bench, weights: Weights) -> int:
    """Bring the model to a file's weights, the others as in the original; gives how many were set."""
    config = bench.model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    for name in [n for n in weights if "qkv_proj" in n]:
        parts = weights.pop(name).split([heads * size, kv * size, kv * size])
        weights |= {name.replace("qkv_proj", f"{p}_proj"): part for p, part in zip("qkv", parts, strict=True)}
    head, inputs, outputs = weights.get("lm_head.weight"), "model.embed_tokens.weight", bench.model.lm_head
    if inputs not in weights and head is not None:
        weights[inputs] = head  # tied: the table is the head
    apart = head is not None and not torch.equal(head, weights[inputs])
    outputs.weight = torch.nn.Parameter(head) if apart else bench.model.get_input_embeddings().weight
    count = int(apart)
    with torch.inference_mode():
        for path, original in bench.dense.items():
            found = weights.get(f"{path}.weight")
            used = original if found is None else found[:, : original.shape[1]]
            bench.model.get_submodule(path).weight.copy_(used)
            count += found is not None
    return count


def report(data: dict[str, Any]) -> str:
    lines = []
    for row in sorted(data["rows"], key=lambda r: float(r["kl"])):
        name = f"**{row['name']}**" if row["name"].startswith("lowbit") else row["name"]
        cells = [f"{row['texts'][t]['kl']:.4f} ± {row['texts'][t]['standard_error']:.4f}" for t in TEXTS]
        lines.append((name, f"{row['kl']:.4f}", *cells, f"{100 * row['agreement']:.1f}%", str(row["weights"])))
    head = ("file", "KL both", "KL sqlite", "KL Moby Dick", "top 1", "weights set")
    return (
        "# How far each peer's file is from the original\n\n"
        f"The reference model off its grid (SmolLM2-135M-Instruct), {data['windows']} windows of {WINDOW} tokens of each "
        "text, weights dequantised, activations fp32. 'width 256 n': quantised as a model is whose rows hold whole blocks "
        "of 256, such as the 1.1 B. OpenVINO's and torchao's int4 of the 1.1 B have groups of 128, which SmolLM2 cannot have: "
        "the groups of 64 measured here flatter them. torchao makes the head low-bit and keeps the embedding: one weight "
        f"more.\n\n{common.table(head, lines)}\n"
    )


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--peers", type=Path, default=DEFAULT_PEERS, help="the folder that make bench-peers filled")
    options.add_argument("--windows", type=int, default=6, help="windows of each text (48 at most)")
    options.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows whose name contains one of these")
    chosen = options.parse_args()
    path: Path = chosen.results / "peers_quality.json"
    data: dict[str, Any] = {"rows": []}
    if path.exists() and chosen.only:
        data = common.json.loads(path.read_text())
        known = {name for name, _ in candidates(chosen.peers)}
        data["rows"] = [row for row in data["rows"] if row["name"] in known]
    bench = Bench(reference_model("plain"), "cpu", chosen.windows)
    data |= {"machine": common.machine(commit=chosen.commit), "windows": chosen.windows}
    for name, read in candidates(chosen.peers):
        if chosen.only and not any(word in name for word in chosen.only):
            continue
        weights = read()
        count = put(bench, weights) if isinstance(weights, dict) else len(bench.dense)
        model = bench.model if isinstance(weights, dict) else weights
        found = {text: divergence(model, bench.original, ids) for text, ids in bench.ids.items()}
        kl = sum(f.kl for f in found.values()) / len(found)
        agreement = sum(f.agreement for f in found.values()) / len(found)
        texts = {text: {"kl": f.kl, "standard_error": f.standard_error} for text, f in found.items()}
        row = {"name": name, "kl": kl, "agreement": agreement, "texts": texts, "weights": count}
        data["rows"] = [r for r in data["rows"] if r["name"] != name] + [row]
        print(f"{name:30s} KL {kl:.4f}, {count} weights", flush=True)
        common.write_results(chosen.results, "peers_quality", report(data), data)


if __name__ == "__main__":
    main()
