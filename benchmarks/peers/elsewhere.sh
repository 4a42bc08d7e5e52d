#!/bin/bash
# Set up the benchmarks on a bare machine that nothing can be fetched from: the peers are compiled and the models filled in from the
# archives that were carried there. Needs gcc, cmake, ninja, and a Python with torch, transformers, safetensors and scikit-build-core.
#
#   benchmarks/peers/elsewhere.sh pack PEERS OV_SITE ARCHIVES    here: sources, shells of the models, OpenVINO's wheels unpacked
#   benchmarks/peers/elsewhere.sh make ARCHIVES PEERS JOBS       there: PEERS is then what make bench-peers leaves
set -eu
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$here/../.." && pwd)

pack() {
    local peers=$1 site=$2 out=$3 shells
    mkdir -p "$out"
    shells=$(mktemp -d)
    python3 "$here/shells.py" pack "$peers/models" "$shells/shells"
    tar c -C "$shells" shells | xz -T2 -6 >"$out/shells.tar.xz"
    rm -r "$shells"
    # Other processors' backends, pictures and the server's pages are most of the sources.
    local no=(--exclude=ggml-{cuda,vulkan,sycl,opencl,metal,cann,hexagon,webgpu,hip,musa} --exclude=ggml-cuda.cu
        --exclude=vulkan-shaders --exclude=ui --exclude=server --exclude=docs --exclude='*.png' --exclude='*.gguf' --exclude={llama,ik}/models)
    for name in llama ik; do
        tar c -C "$peers/source" -h "${no[@]}" "$name" | xz -T2 -3 >"$out/$name.tar.xz"
    done
    # Of OpenVINO only what a CPU and its own file format need.
    local plugins=(--exclude='*intel_gpu*' --exclude='*intel_npu*' --exclude=cache.json --exclude='*_onnx_*' --exclude='*_tensorflow*'
        --exclude='*_pytorch*' --exclude='*_paddle*' --exclude='*_gguf*' --exclude='*_jax*')
    tar c -C "$site" "${plugins[@]}" --transform 's,^\.,site,' . | xz -T2 -4 >"$out/openvino.tar.xz"
    ls -l "$out"
}

build() { # name, jobs, more options
    local flags=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF
        -DLLAMA_BUILD_TESTS=OFF)
    cmake -S "$1" -B "../$1" "${flags[@]}" "${@:3}" && ninja -j"$2" -C "../$1" llama-bench llama-quantize llama-batched-bench
}

make_all() {
    local archives peers jobs=$3
    archives=$(cd "$1" && pwd)
    mkdir -p "$2"/{source,models,log,openvino/bin,torch/bin}
    peers=$(cd "$2" && pwd)
    for name in llama ik; do tar xJf "$archives/$name.tar.xz" -C "$peers/source"; done
    cd "$peers/source"
    build llama "$jobs" -DLLAMA_BUILD_EXAMPLES=OFF >"$peers/log/llama.log" 2>&1 &
    local llama=$!
    build ik "$jobs" >"$peers/log/ik.log" 2>&1 &
    local ik=$!
    cd "$tree"
    python3 -m pip install -q --no-index --no-deps --no-build-isolation --target "$peers/ours" . >"$peers/log/ours.log" 2>&1
    mkdir -p "$peers/site"
    tar xJf "$archives/openvino.tar.xz" -C "$peers/site" --strip-components=1
    tar xJf "$archives/shells.tar.xz" -C "$peers"
    printf '#!/bin/sh\nPYTHONPATH=%s exec python3 "$@"\n' "$peers/site" >"$peers/openvino/bin/python"
    printf '#!/bin/sh\nexec python3 "$@"\n' >"$peers/torch/bin/python"
    chmod +x "$peers"/{openvino,torch}/bin/python
    gcc -shared -fPIC -O2 "$here/without_amx.c" -o "$peers/without_amx.so" -ldl
    export PYTHONPATH=$peers/ours:$tree/assets
    python3 "$here/shells.py" fill "$peers/shells" "$peers/models"
    wait $llama
    cd "$peers/models"
    for model in smollm2-f32 random-1.1b-bf16; do
        for kind in Q4_0 Q4_K_M Q8_0; do
            ../llama/bin/llama-quantize $model.gguf ${model%-*}-$kind.gguf $kind "$jobs" >>"$peers/log/quantize.log" 2>&1
        done
    done
    wait $ik
    ls "$peers"/{llama,ik}/bin "$peers/models"
}

case $1 in
pack) pack "${@:2}" ;;
make) make_all "${@:2}" ;;
esac
