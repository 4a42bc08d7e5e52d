# Everything runs in .venv, which is made on first use: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
CORE_SOURCES := $(shell find src/lowbit/csrc -type f)
PINS := -c requirements/constraints.txt
# An older transformers beside the newest: the tests of the meeting with it run on both.
OTHER_TRANSFORMERS := 5.12.1
OVERLAY := $(VENV)/transformers-$(OTHER_TRANSFORMERS)

.PHONY: help demo test check check-types check-commands check-rest check-sanitize check-neon bench bench-peers form clean setup

help:
	@echo "make demo    set everything up and quantise, save, load and run a small model"
	@echo "make test    set everything up and pass every test"
	@echo "make check   ruff, mypy, form tests, unit tests; under two minutes"
	@echo "make check-sanitize  the core's native checks under ASan, UBSan and TSan"
	@echo "make check-neon  the core's native checks for 64-bit Arm, under an emulator"
	@echo "make bench   the benchmarks, written to benchmarks/results (small forms of long ones to build/benchmarks)"
	@echo "make bench-peers   the programs to measure against, in PEERS (20 GB, half an hour); IK_SOURCE=DIR adds ik_llama.cpp"

setup: $(READY)

$(READY): pyproject.toml requirements/constraints.txt requirements/assets.txt $(CORE_SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet $(PINS) "scikit-build-core>=0.11" cmake ninja
	$(RUN)/pip install --quiet $(PINS) --no-build-isolation --editable ".[dev]"
	$(RUN)/pip install --quiet --no-deps -r requirements/assets.txt
	touch $@

$(OVERLAY): $(READY)
	$(RUN)/pip install --quiet --target $@ transformers==$(OTHER_TRANSFORMERS)

demo: $(READY)
	$(RUN)/lowbit demo

# A core for each of two: the tests of commands, checkpoints and old names, which start Pythons of their own, and then all others.
check: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 check-commands check-types check-rest

check-types:
	$(RUN)/mypy

check-commands check-rest: export OMP_NUM_THREADS := 1
check-commands:
	$(RUN)/pytest tests/unit/test_c*.py -m "not slow"
check-rest:
	$(RUN)/pytest tests/form tests/unit -m "not slow" --ignore-glob='*/test_c*.py'

# A deadlock ends as a failure too. ASan and UBSan see the portable instruction set and the best one of this machine (all that it runs:
# SETS='avx2;avx512', 45 s more); TSan sees the portable one, since all meet in the pool in the same way. What of UBSan is left out in
# the files with register tiles is in src/lowbit/csrc/CMakeLists.txt. Processor time: 110 s and 55 s, of which 40 s are the checks.
NATIVE := $(RUN)/cmake -S tests/cpu/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(RUN)/ninja
SETS ?= $(if $(shell grep -sm1 avx512_vbmi /proc/cpuinfo),avx512,avx2;neon;neon_i8mm)
check-sanitize: $(READY)
	$(NATIVE) -B build/asan -DLOWBIT_SANITIZE=address,undefined -DLOWBIT_SETS='$(SETS)'
	$(RUN)/cmake --build build/asan
	timeout 900 build/asan/core_check
	$(NATIVE) -B build/tsan -DLOWBIT_SANITIZE=thread -DLOWBIT_SETS=
	$(RUN)/cmake --build build/tsan
	timeout 900 build/tsan/core_check products engine experts threads

# Needs a cross compiler and an emulator, and names their packages where they are missing.
check-neon: $(READY)
	PATH=$(CURDIR)/$(RUN):$$PATH sh tests/cpu/native/neon.sh build/neon

test: $(READY) $(OVERLAY)
	$(RUN)/pytest tests
	# Whole scripts of the guides promise today's packages, and take six minutes.
	PYTHONPATH=$(OVERLAY) $(RUN)/pytest tests -m transformers --ignore=tests/seeds

bench: $(READY)
	$(RUN)/python benchmarks/default_format.py
	$(RUN)/python benchmarks/load_times.py
	$(RUN)/python benchmarks/cache_kl.py

PEERS ?= .venv-peers
bench-peers: $(READY)
	$(RUN)/python benchmarks/peers/prepare.py $(PEERS) $(if $(IK_SOURCE),--ik-source $(IK_SOURCE))

clean:
	rm -rf $(VENV) build
