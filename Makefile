# make demo · make demo-control · make ui · make test · make test-quick · make lint · make bench
PYTHON ?= python3
BIN := .venv/bin
# setuptools warns of the folders that are linked into the package, as they are meant to be
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: demo demo-control ui test test-quick test-ray lint bench clean

demo: .venv/installed
	$(BIN)/python -m recipes.tiny_world.demo

demo-control: demo
	$(BIN)/python -m recipes.tiny_world.demo_control --subject fox --subject_adapter demo/fox/adapter

ui: .venv/installed-ui
	$(BIN)/ether ui --open

# a thread for each worker: threads of torch that share a core are slower than none; `make test WORKERS=3` sets how many
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

test-quick: lint
	$(PYTEST) -m "not slow"

# on a Ray of this machine: two at once are too much for two cores, and Ray reads its token once in a process
test-ray: .venv/installed-dev
	$(INSTALL) '.[dev,ray]'
	for file in serving_ray jobs_command; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_$$file.py || exit 1; done

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/python -m tools.bench_reflections layers

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(INSTALL) .
	touch $@

.venv/installed-ui: .venv/installed
	$(INSTALL) '.[ui]'
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
