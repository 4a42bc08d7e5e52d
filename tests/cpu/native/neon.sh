#!/bin/sh
# Builds the core and its native checks for 64-bit Arm and runs them under an emulator:  neon.sh BUILD_DIR [groups of core_check]
# Exits with 77 where the compiler or the emulator is missing. -O1: the register tiles would take a minute to compile at -O2.
set -e
here=$(dirname "$0")
build=$1
shift
for name in aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-14 aarch64-linux-gnu-g++-13 aarch64-linux-gnu-g++-12; do
    compiler=$(command -v $name) && break
done
emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || true
if [ -z "$compiler" ] || [ -z "$emulator" ]; then
    echo "no compiler for 64-bit Arm or no emulator: apt install g++-aarch64-linux-gnu qemu-user-static" >&2
    exit 77
fi
cmake -S "$here" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$compiler" -DLOWBIT_TILES=-O1 >/dev/null
cmake --build "$build" -j 2
timeout 900 "$emulator" -cpu max -L /usr/aarch64-linux-gnu "$build/core_check" "$@"
