# One command each for what is done often. `make setup` first; the others use its .venv.
PYTHON := .venv/bin/python
# One that has torch with CUDA; `make gpu` installs nothing.
GPU_PYTHON ?= python3

.PHONY: setup lint format test test-plugins bench static gpu rivals tiny wheel clean

setup:  ## .venv with entcov and the packages of constraints.txt
	./scripts/setup.sh

lint: setup  ## style and obvious mistakes
	$(PYTHON) -m ruff check .

format: setup  ## lay the Python files out
	$(PYTHON) -m ruff format .

test: setup  ## the CPU suite, and the tests of the plug-ins
	./scripts/setup_and_test.sh

test-plugins:  ## those of the plug-ins alone, in .venv-verl and .venv-trl
	./scripts/test_plugins.sh

bench: setup  ## speed of the ops against eager and compiled torch, with byte counts
	$(PYTHON) -m benchmarks ops

static: setup  ## registers, spills, load widths and hot loops of the CUDA kernels, from their machine code; no GPU
	$(PYTHON) -m benchmarks static

gpu:  ## on a machine with a GPU, torch and nvcc, offline: build, tests, sanitizer, benchmarks, trainings. RIVALS=, WHEELS=folder
	$(GPU_PYTHON) -m benchmarks gpu $(if $(RIVALS),--rivals $(RIVALS)) $(if $(WHEELS),--wheels $(WHEELS))

rivals:  ## download what `make gpu RIVALS=rivals` compares with into rivals/ (17 MB)
	$(GPU_PYTHON) -m benchmarks rivals rivals

tiny: setup  ## train the tiny recipe: some minutes on two cores
	./scripts/setup_and_train.sh

wheel: setup  ## dist/entcov-*.whl for this machine's Python
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## build products; runs/ and .venv stay
	rm -rf build dist *.egg-info entcov/*.so .pytest_cache .ruff_cache .venv*/entcov*_installed
