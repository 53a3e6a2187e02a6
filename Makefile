# One door for people and CI. `make demo` and `make test` work as the first command on a fresh clone.
PY := .venv/bin/python
export DS_ACCELERATOR ?= cpu
# How long a thread waits for its peers by spinning: some 50 us. Without, every one of a picture's
# hundreds of small products waits for the kernel to wake a thread; with the default of some
# milliseconds, threads starve each other as soon as a core is busy elsewhere.
export GOMP_SPINCOUNT ?= 5000

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
	$(PY) examples/demo/run.py --review true

learn: setup
	$(PY) examples/digits/learn.py

learn-ablate: setup
	$(PY) examples/digits/ablate.py

bench: setup
	$(PY) -m tests.benchmarks

gpu-check: setup
	$(PY) pipelines/gpu_check.py

drill: setup
	$(PY) -m tests.drills

clean:
	rm -rf runs build
