# One door for people and CI. `make demo` and `make test` work as the first command on a fresh clone.
PY := .venv/bin/python
export DS_ACCELERATOR ?= cpu
# Threads that wait by spinning starve each other as soon as a core is busy elsewhere.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test check format bench learn learn-ablate drill review gpu-check clean

setup: .venv/.ready

.venv/.ready: pyproject.toml infra/constraints.txt
	python3.11 -m venv .venv
	.venv/bin/pip install -q -c infra/constraints.txt pip setuptools wheel packaging ninja numpy
	.venv/bin/pip install -q -c infra/constraints.txt torch==2.13.0
	.venv/bin/pip install -q -c infra/constraints.txt -e ".[eval,demo,web,dev]"
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv/bin/pip install -q -c infra/constraints.txt \
		--no-build-isolation --no-cache-dir --no-deps mamba-ssm  # its Triton sources, for the tests
	touch $@

demo: setup
	$(PY) pipelines/demo.py

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
	$(PY) pipelines/demo.py --review true

learn: setup
	$(PY) pipelines/learn.py

learn-ablate: setup
	$(PY) pipelines/learn_ablate.py

bench: setup
	$(PY) -m tests.benchmarks

gpu-check: setup
	$(PY) pipelines/gpu_check.py

drill: setup
	$(PY) -m tests.drills

clean:
	rm -rf runs build
