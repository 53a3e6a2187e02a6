# Commands for people and CI. `make demo` and `make test` work as the first command on a fresh clone.
PY := .venv/bin/python
export DS_ACCELERATOR ?= cpu
# OpenMP threads spin for about 50 us while they wait for each other. Without spinning, the kernel has
# to wake a thread for each of the hundreds of small matrix products in an image. With the default of
# a few milliseconds, threads starve each other as soon as another process uses a core.
export GOMP_SPINCOUNT ?= 5000

.PHONY: setup demo test check format bench learn learn-ablate learn-depth learn-width learn-scenes learn-text \
	drill review docs gpu-check clean

setup: .venv/.ready

.venv/.ready: pyproject.toml infra/constraints.txt
	python3.11 -m venv .venv
	.venv/bin/pip install -q -c infra/constraints.txt pip setuptools wheel packaging ninja numpy
	.venv/bin/pip install -q -c infra/constraints.txt torch==2.13.0
	.venv/bin/pip install -q -c infra/constraints.txt -e ".[eval,demo,web,dev]"
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv/bin/pip install -q -c infra/constraints.txt \
		--no-build-isolation --no-cache-dir --no-deps mamba-ssm  # the tests use its Triton sources
	touch $@

demo: setup
	$(PY) examples/demo/run.py

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/mypy

test: check
	$(PY) -m pytest

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

review: setup
	$(PY) examples/demo/run.py --review

learn: setup
	$(PY) examples/digits/learn.py

learn-ablate: setup
	$(PY) examples/digits/ablate.py

learn-depth: setup
	$(PY) examples/digits/depth.py

learn-width: setup
	$(PY) examples/digits/width.py

learn-scenes: setup
	$(PY) examples/scenes/learn.py

learn-text: setup
	$(PY) examples/text/learn.py

bench: setup
	$(PY) -m benchmarks

docs: .venv/.docs-ready
	.venv/bin/sphinx-build -W -n --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

.venv/.docs-ready: .venv/.ready
	.venv/bin/pip install -q -c infra/constraints.txt -e ".[docs]"
	touch $@

gpu-check: setup
	$(PY) pipelines/gpu_check.py

drill: setup
	$(PY) -m tests.drills

clean:
	rm -rf runs build docs/how-to/runbooks docs/reference/api
	rm -f docs/reference/commands.md docs/reference/configuration.md
