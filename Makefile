# `make demo`: build engines from checkpoints and segment pictures.  `make test`: all tests but the slow ones, which
# `make test TESTS="not cluster"` runs, too.  `make test-lowest`: with the oldest versions.  `make test-triton`: on
# a real Triton Inference Server.  `make lint`: all checks.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
RUNS ?= runs
TESTS ?= not slow
BIN = $(VENV)/bin
LOWEST ?= .venv-lowest
PYTHON_LOWEST ?= python3.12
TRITON ?= .venv-triton
PYTHON_TRITON ?= python3.11
# setuptools warns of itself, and of bytecode where the user wants none.
QUIET = PYTHONWARNINGS=ignore PYTHONDONTWRITEBYTECODE=
PIP = $(QUIET) $(BIN)/python -m pip install -qq --disable-pip-version-check
READY = $(VENV)/.ready
SOURCES = agln_fast kernels export bench tests setup.py

.PHONY: demo checkpoints test test-cluster test-lowest test-triton lint format clean

$(READY): pyproject.toml setup.py constraints.txt
	@echo "installing into $(VENV): about a minute, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Each command is shown as a user would type it.
demo: $(READY)
	@$(BIN)/python -m agln_fast.bench.jobs.demo pictures $(DEMO)
	@show() { echo; echo "\$$ $$*"; PATH="$(BIN):$$PATH" "$$@"; }; \
	build() { show agln-fast build "$$1"_nano -o $(DEMO)/"$$1".agln --size 128x128 --output logits --force $$2; }; \
	build agln "--precision fp32 --precision fp16 --target cpu --target tensorrt-rtx" && \
	build fpn "--precision fp32" && build agln_lite "--precision fp32" && \
	show agln-fast run $(DEMO)/agln.agln $(DEMO)/scenes/images $(DEMO)/photograph.png -o $(DEMO)/out
	@echo
	@$(BIN)/python -m agln_fast.bench.jobs.demo compare $(DEMO)
	@$(BIN)/python -m agln_fast.bench.jobs.demo serve $(DEMO)

# Trains the checkpoints in agln_fast/checkpoints again: hours on two cores. It may be stopped; it goes on.
checkpoints: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m agln_fast.bench.jobs.checkpoints $(RUNS)

# A core for each process: PyTorch's threads of two would wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "$(TESTS)"

# Clusters of Ray on this machine, each a dozen processes: one test after the other.
test-cluster: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/serving

# The same with the oldest versions that the metadata allows, among them PyTorch's CUDA build: gigabytes, once.
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal -m "$(TESTS)"

$(LOWEST)/.ready: pyproject.toml setup.py constraints-lowest.txt
	@echo "installing into $(LOWEST): some minutes, once"
	@$(PYTHON_LOWEST) -m venv $(LOWEST)
	@$(QUIET) $(LOWEST)/bin/python -m pip install -qq --disable-pip-version-check \
		--constraint constraints-lowest.txt --editable ".[dev]"
	@touch $@

# Triton Inference Server 24.10 with its Python backend alone, out of the package nvidia-pytriton (glibc 2.35 or newer).
# That backend crashes with NumPy 2, so agln-fast is installed there without what it asks for.
test-triton: $(READY) $(TRITON)/.ready
	OMP_NUM_THREADS=1 AGLN_FAST_TEST_TRITON=$(TRITON) $(BIN)/python -m pytest tests/serving/test_triton_server.py

$(TRITON)/.ready: pyproject.toml setup.py
	@echo "installing into $(TRITON): about a minute, once"
	@$(PYTHON_TRITON) -m venv $(TRITON)
	@$(QUIET) $(TRITON)/bin/python -m pip install -qq --disable-pip-version-check \
		"numpy<2" jsonschema onnxruntime pillow rich typer
	@$(QUIET) $(TRITON)/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
		nvidia-pytriton==0.7.0 --editable .
	@cd $(TRITON)/lib/python3.*/site-packages/pytriton/tritonserver/backends/python && \
		ln -sf ../../python_backend_stubs/`cd ../../../../.. && basename $$PWD | sed s/python//`/triton_python_backend_stub .
	@touch $@

# Types and layers are checked on a build tree, where the mapped folders lie inside the package.
lint: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	rm -rf build/lint
	$(QUIET) $(BIN)/python setup.py --quiet build_py --build-lib build/lint
	$(BIN)/mypy --config-file pyproject.toml build/lint/agln_fast
	cd build/lint && $(abspath $(BIN))/lint-imports --config ../../pyproject.toml

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) $(TRITON) $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
