# What one types here. `make` alone lists it.
VENV := .venv
PYTHON ?=
BIN := $(VENV)/bin
READY := $(VENV)/requirements.lock

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all lint bench pretrained manifests lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the locked packages (another Python: PYTHON=/path/to/python3.12)

$(READY): requirements.lock pyproject.toml
	@sh scripts/setup.sh

train: $(READY) ## Fine-tune; say what with ARGS="experiment=... phases.head.epochs=3"
	$(BIN)/python -m trainer $(ARGS)

test: $(READY) ## Run the quick tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 30 -m "not slow and not gpu"

test-all: $(READY) ## Run every test that needs no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu" --timeout 1800

lint: $(READY) ## Check style, types and YAML
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m yamllint --strict .

bench: $(READY) ## Measure, side by side
	$(BIN)/python -m benchmarks $(ARGS)

pretrained: $(READY) ## Train the packaged backbone again
	$(BIN)/python pretraining/train.py $(ARGS)

manifests: $(READY) ## Write k8s/job.yaml and k8s/multiworker.yaml from k8s/base and k8s/overlays
	$(BIN)/python scripts/manifests.py

lock: $(READY) ## Choose the newest versions that pyproject.toml allows, and write requirements.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		--upgrade --quiet --extra dev pyproject.toml --output-file requirements.lock
	@echo "lock: requirements.lock is written; make setup installs it"

clean: ## Remove .venv, caches and builds; what runs wrote to outputs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
