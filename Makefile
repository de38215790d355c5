# `make demo`: build engines from a checkpoint and segment a photograph.  `make test`: all tests.  `make lint`: all checks.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN = $(VENV)/bin
READY = $(VENV)/.ready
SOURCES = agln_fast kernels export bench tests setup.py

.PHONY: demo test lint format clean

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m agln_fast.bench.demo $(DEMO)
	$(BIN)/agln-fast build $(DEMO)/agln.pth -o $(DEMO)/agln.agln --size 512x512 --precision fp32 --precision fp16 \
		--target cpu --target tensorrt-rtx --samples $(DEMO)/photograph.png --force
	$(BIN)/agln-fast build $(DEMO)/fpn.pth -o $(DEMO)/fpn.agln --precision fp32 --precision fp16 \
		--target tensorrt-rtx --samples $(DEMO)/photograph.png --force
	$(BIN)/agln-fast build $(DEMO)/agln_lite.safetensors -o $(DEMO)/agln_lite.agln --precision fp32 --precision fp16 \
		--target tensorrt-rtx --samples $(DEMO)/photograph.png --force
	$(BIN)/agln-fast run $(DEMO)/agln.agln $(DEMO)/photograph.png -o $(DEMO)/out

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Types and layers are checked on a build tree, where the mapped folders lie inside the package.
lint: $(READY)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	rm -rf build/lint
	$(BIN)/python setup.py --quiet build_py --build-lib build/lint
	$(BIN)/mypy --config-file pyproject.toml build/lint/agln_fast
	cd build/lint && $(abspath $(BIN))/lint-imports --config ../../pyproject.toml

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
