# PYTHON=python3.12   the Python that the virtual environment is made with
# PYTHON_VERSION=3.12  the Python of a GPU node, for `make wheelhouse`
# TORCH_INDEX=<url>   the index that torch comes from, such as https://download.pytorch.org/whl/cpu
# JOBS=3              how many tests run at once (many only wait)
# ARGS="..."          passed on to pytest, the demo or the benchmarks
PYTHON ?= python3
TORCH_INDEX ?=
PYTHON_VERSION ?= 3.12
JOBS ?= 3
ARGS ?=

VENV := .venv
RIVALS := .venv-rivals
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n $(JOBS)
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
READY := $(VENV)/.ready
NATIVE := $(VENV)/.native
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl) csrc/compile_flags.txt
CSRC_FORMATTED := $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/*/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help system venv native demo demo-s3 test test-slow test-matrix test-gpu gpu-checklist gpu-node wheelhouse wheels check fmt lint types docs bench bench-codec bench-first-contact bench-host bench-incremental bench-long-run bench-many-ranks bench-objects bench-resharding bench-rivals bench-scale bench-stall bench-storage clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

system:
	@PYTHON="$(PYTHON)" scripts/setup-system.sh

# torch comes first and pinned, so that nothing below can pull another build of it.
$(READY): pyproject.toml constraints.txt | system
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time this takes minutes, most of it for torch."
	@$(PIP) setuptools
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@FASTCKPT_NO_NATIVE=1 $(PIP) --no-build-isolation --editable '.[dev,bench]'
	@touch $@

# Without a compiler this prints one sentence and leaves no stamp, so that the next run tries again.
$(NATIVE): setup.py $(CSRC) $(READY)
	@$(PY) setup.py --quiet build_ext --inplace
	@rm -f $@; if ls fastckpt/_native*.so >/dev/null 2>&1; then touch $@; fi

venv: $(READY) $(NATIVE) ## make .venv with everything that the other targets need

native: $(READY) ## rebuild the C++ kernels (FASTCKPT_SANITIZE=address,undefined adds sanitizers)
	@rm -f $(NATIVE)
	@$(MAKE) --no-print-directory $(NATIVE)

demo: venv ## train until a spot notice, finish in a new process, compare every bit; ARGS="--ranks 4": lose a rank, go on with three
	@$(PY) examples/demo.py $(ARGS)

demo-s3: venv ## the same against a real S3 server on loopback (radosgw)
	@$(PY) -m tests.s3server $(abspath $(PY)) examples/demo.py $(ARGS)

check: lint types ## what to run before each commit, in two minutes: style, types, and the tests that need no processes and servers
	$(PYTEST) --session-timeout=600 tests/unit tests/golden tests/contract tests/differential $(ARGS)

# Some 15 minutes on two quiet cores; no test starts after 25.
test: venv ## run all tests but the slow ones (JOBS=1: in one process)
	$(PYTEST) --session-timeout=1500 $(ARGS)

test-slow: venv ## run the tests that take minutes
	$(PY) -m pytest -m slow $(ARGS)

test-matrix: venv ## run the tests on other Pythons and torches, each in an environment of its own (ARGS="--only 3.12+2.11")
	$(PY) -m tests.matrix $(ARGS)

test-gpu: venv ## run the tests that need a CUDA device
	$(PY) -m pytest -m gpu $(ARGS)

gpu-checklist: venv ## the eight steps of a run on a CUDA device; writes a result
	$(PY) -m tests.gpu.first_run $(ARGS)

gpu-node: ## the same on a node without a network, over its own torch; needs `make wheelhouse` (ARGS="--minutes 12 --out FOLDER")
	@PYTHON="$(PYTHON)" scripts/gpu-node.sh $(ARGS)

wheelhouse: ## wheels for such a node: PYTHON_VERSION=3.12
	@PYTHON_VERSION="$(PYTHON_VERSION)" scripts/wheelhouse.sh

wheels: venv ## build the wheel for each Python that is here, and try one in a fresh environment without a compiler
	@PYTHON="$(abspath $(PY))" scripts/wheels.sh

fmt: venv ## put the code into its form
	$(PY) -m ruff format
	$(PY) -m ruff check --fix
	$(VENV)/bin/clang-format -i $(CSRC_FORMATTED)

lint: venv ## check style, and the plan of the source (scripts/house.py)
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) scripts/house.py
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC_FORMATTED)

types: venv ## check types, those of a user's program too
	$(PY) -m mypy
	$(PY) -m pytest tests/types

docs: venv ## check the documents: links, and that their Python code runs
	$(PY) -m pytest tests/docs $(ARGS)

bench: venv ## run the benchmarks
	$(PY) benchmarks/run.py $(ARGS)

bench-codec: venv ## compare the codec with ZipNN and zstd
	@$(PIP) zipnn==0.5.4
	$(PY) benchmarks/codec.py $(ARGS)

bench-first-contact: venv ## measure what somebody meets who tries it: import, first calls, one tensor of S3
	@if $(PY) -c 'from tests import s3server; raise SystemExit(s3server.choose().kind is None)'; \
	then $(PY) -m tests.s3server $(abspath $(PY)) benchmarks/first_contact.py $(ARGS); else $(PY) benchmarks/first_contact.py $(ARGS); fi

bench-host: venv ## measure what the call of save costs for each of 10,000 storages
	$(PY) benchmarks/host_time.py $(ARGS)

bench-incremental: venv bench-rivals ## what each save adds, and what restores take, with deltas: real training, against moonclip (ARGS="--only pairs")
	$(PY) benchmarks/incremental.py $(ARGS)

bench-long-run: venv ## measure whether a run's age costs anything: 2,000 saves, retention and fresh readers
	$(PY) benchmarks/long_run.py $(ARGS)

bench-many-ranks: venv ## compare a save of four ranks with torch.distributed.checkpoint's
	$(PY) benchmarks/many_ranks.py $(ARGS)

bench-objects: venv ## measure what grows with the number of tensors, views and numbers
	$(PY) benchmarks/objects.py $(ARGS)

bench-resharding: venv ## measure what a restore on another layout costs: a plan for 1,024 ranks, and loads against two others
	@$(PIP) --no-deps torch_checkpointing==0.1.1 || echo "Without torch_checkpointing: its rows will say so."
	$(PY) benchmarks/resharding.py $(ARGS)

bench-rivals: $(RIVALS)/.ready ## make .venv-rivals with the rivals that bench-storage compares with

# torch comes first and pinned, as in .venv.
$(RIVALS)/.ready: benchmarks/storage_rivals.txt
	@$(RIVALS)/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(RIVALS)
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install --quiet 'setuptools<81'
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

bench-scale: venv ## what a save asks of stores with 1,024 and 16,384 ranks, simulated
	$(PY) benchmarks/scale.py $(ARGS)

bench-stall: venv ## measure what saving costs a training loop
	$(PY) benchmarks/stall.py $(ARGS)

bench-storage: venv bench-rivals ## compare saves and loads of S3, local disks and given links with five others (ARGS="--only s3,local")
	@$(PIP) --no-deps torch_checkpointing==0.1.1 || echo "Without torch_checkpointing: its rows will say so."
	$(PY) benchmarks/storage.py $(ARGS)

clean: ## remove everything that can be made again, .venv too
	rm -rf $(VENV) $(RIVALS) build dist demo-out *.egg-info fastckpt/_native*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fastckpt tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
