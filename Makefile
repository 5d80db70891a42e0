# `make serve` and `make test` set up what they need in .venv; `make help` lists the rest.

HOST  ?= 127.0.0.1
PORT  ?= 8000
MODEL ?= models/nano
ARGS  ?=
# The version that the tests run with. Any from 2.11 on should do: TORCH="torch==2.11.0 --index-url ..." chooses the build.
TORCH ?= torch==2.13.0
# The first Python that is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

PY := .venv/bin/python
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
# A test process per core and one more, as many tests wait for servers. ARGS="-n 0" runs all in one, as -s and a debugger need.
PYTEST := $(PY) -m pytest -q -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 8 --dist worksteal

.PHONY: help serve test lint test-slow test-faults test-ops test-compat fuzz constraints install train bench bench-growth bench-decoders kernels-static clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

serve: .venv/.runtime  ## serve MODEL (models/nano) on HOST:PORT (127.0.0.1:8000); ARGS="..." adds flags of `fastblt serve`
	@exec $(PY) -m server serve --model "$(MODEL)" --host "$(HOST)" --port "$(PORT)" $(ARGS)

test: lint  ## lint and run the tests
	$(PYTEST) $(ARGS)

lint: .venv/.dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-slow: .venv/.dev  ## run the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-faults: .venv/.dev  ## kill, freeze, starve and crowd real servers for minutes (docs/reliability.md)
	$(PY) -m pytest -q tests/faults -m "faults or not faults" $(ARGS)

test-ops: .venv/.ops  ## test page, dashboards, clients, containers, Ray with real tools; installs Debian packages
	@missing=; for c in prometheus promtool chromium chromedriver podman runc debootstrap javac; do \
		command -v $$c >/dev/null || missing=1; done; \
	test -z "$$missing" || { $(SUDO) apt-get update -qq && \
		$(SUDO) apt-get install -y -qq prometheus chromium chromium-driver podman runc debootstrap \
			default-jdk-headless; }
	$(PY) -m pytest -q tests/ops $(ARGS)

test-compat: .venv/.dev  ## test with the programs that people point at a server, each in .venv-compat/NAME; offline once these are there
	$(PY) -m pytest -q tests/compat $(ARGS)

fuzz: .venv/.fuzz  ## fuzz what reads requests, checkpoints and messages, an hour each; ARGS="--minutes 5 --target parser"
	$(PY) -m tests.fuzz.run $(ARGS)

simulate: .venv/.dev  ## play 100,000 requests under drawn faults on a virtual clock; ARGS="--seeds 5 --first 7" (docs/reliability.md)
	$(PY) -m tests.simulation.run $(ARGS)

# For the oldest Python, whose versions newer ones take too.
constraints: .venv/.ops  ## resolve deploy/constraints.txt, the versions in the container image, anew
	printf '%s\n' '$(firstword $(TORCH))' hatchling | .venv/bin/uv pip compile -q --no-python-downloads --upgrade --no-annotate \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --extra traces pyproject.toml - \
		--custom-compile-command "make constraints" --output-file deploy/constraints.txt

install: .venv/.runtime  ## make .venv with what serving needs

train: .venv/.dev corpus.tar.xz  ## train models/nano anew; ARGS="--minutes 60", ARGS=--resume
	$(PY) -m training.train --out models/nano --corpus corpus.tar.xz $(ARGS)

corpus.tar.xz: .venv/.dev training/packages.txt  ## download the text that models/nano learns from
	$(PY) -m training.corpus --packages --out $@

bench: .venv/.dev  ## measure the short set, ten minutes, into benchmarks/results/README.md; ARGS="--only batching"
	$(PY) -m benchmarks.short $(ARGS)

bench-growth: .venv/.dev  ## time per byte against context length, ours and Hugging Face's
	$(PY) -m benchmarks.growth $(ARGS)

bench-decoders: .venv/.dev  ## speed of the decoders against blt on models/nano
	$(PY) -m benchmarks.decoders $(ARGS)

kernels-static: .venv/.dev .venv-triton/.made  ## what the newest and the oldest Triton make of every kernel, without a GPU
	$(PY) -m benchmarks.kernels_static --ones $(ARGS)
	.venv-triton/bin/python -m benchmarks.kernels_static --ones $(ARGS)

.PHONY: gpu-check gpu-wheels
gpu-check:  ## prove and measure on this machine's GPU; uses python3 and its torch, neither .venv nor network (docs/gpu.md)
	@deploy/gpu_check.sh $(ARGS)

.PHONY: gpu-train
gpu-train:  ## train a stage on this machine's GPU, without .venv and network (docs/training.md); ARGS="--device cuda ..."
	@deploy/gpu_train.sh $(ARGS)

# What `gpu-check` needs beside torch, triton and numpy; each brings what it needs itself. The bounds are pyproject.toml's:
# without them pip takes an old release if the newest has no wheel for these platforms.
GPU_WHEELS := 'msgspec>=0.20' 'safetensors>=0.5' 'pydantic>=2.12' 'llguidance>=1.7' 'pytest>=8.4' 'hypothesis>=6.130'
gpu-wheels:  ## download into .whl what gpu-check needs on a machine with torch, for Python 3.12 on x86-64 Linux
	$(PYTHON) -m pip download -q --disable-pip-version-check --dest .whl --only-binary=:all: --python-version 312 \
		--platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 $(GPU_WHEELS)

clean:  ## remove .venv, .venv-compat, .venv-triton and caches
	rm -rf .venv .venv-compat .venv-triton .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz build dist

# Stamps: an environment is made anew where pyproject.toml or this file changed, and not touched otherwise.
.venv/.runtime: pyproject.toml Makefile hatch_build.py $(wildcard kernels/native/*.[ch])
	@test -n "$(PYTHON)" || { echo "fastblt needs Python 3.11 or newer with venv; none found. Name one: make PYTHON=..." >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check $(TORCH)
	$(PY) -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dev,train]"
	@touch $@

.venv/.ops: .venv/.dev
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dev,train,ops]"
	@touch $@

.venv/.fuzz: .venv/.dev
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dev,train,fuzz]"
	@touch $@

# The oldest Triton that we run with, which torch 2.11 brings along, and what compiling needs beside it.
.venv-triton/.made: .venv/.runtime
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install -q --disable-pip-version-check $(TORCH) "triton==3.6.*" \
		msgspec numpy pydantic safetensors tqdm
	@touch $@
