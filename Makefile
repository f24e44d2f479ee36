VENV ?= .venv
BIN := $(VENV)/bin
# Run the vLLM engine core in the calling process, and disable usage statistics and Hub requests.
export VLLM_ENABLE_V1_MULTIPROCESSING ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export VLLM_LOGGING_LEVEL ?= ERROR
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-sharded test-all test-gpu check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## make the virtual environment

$(VENV)/.ready: pyproject.toml requirements/cpu-overrides.txt scripts/setup.sh
	bash scripts/setup.sh $(VENV)

# Training on a CPU frees and maps the same large buffers at every step. Keep them mapped.
demo: export MALLOC_MMAP_MAX_ = 0
demo: export MALLOC_TRIM_THRESHOLD_ = 100000000000
demo: export MALLOC_TOP_PAD_ = 268435456
demo: setup  ## train SmolLM2 on the teacher that reads the answers; writes outputs/demo/
	$(BIN)/python examples/demo.py

# Two processes. Tests of one file share an engine, so a file runs in one process.
test: setup  ## all tests except the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# DeepSpeed is not a dependency of the package, so it is installed in a separate folder.
build/deepspeed/.ready: $(VENV)/.ready
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) \
	  deepspeed==0.19.8 hjson==3.1.0 py-cpuinfo==9.0.0 msgpack==1.2.4
	touch $@

test-sharded: build/deepspeed/.ready  ## FSDP2 and ZeRO-3 in two processes on a CPU
	PYTHONPATH=build/deepspeed $(BIN)/python -m pytest -m slow tests/test_launch.py -k "fsdp2 or zero3"

test-all: setup  ## every test, also the slow ones
	$(BIN)/python -m pytest

test-gpu: setup  ## exactness tests on a GPU: compiled models, CUDA graphs, async scheduling, kernels
	OSD_TEST_CUDA_GRAPHS=1 $(BIN)/python -m pytest -m gpu

check: setup  ## all checks of CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test test-sharded

clean:  ## remove everything that is not in the repository
	rm -rf $(VENV) build outputs models .pytest_cache .ruff_cache .mypy_cache
