# Commands of the project; `make` lists them.
VENV := .venv
PYTHON ?=
BIN := $(VENV)/bin
READY := $(VENV)/requirements.lock
# Variables of `make image`
IMAGE ?= kubetune
DEVICE ?= cpu
BUILD ?= docker build
TARGET ?=
# Variable of `make test-all`: part K of N of the slow tests, as K/N. tests/durations.json has their
# approximate seconds; to measure them, add --store-durations --durations-path tests/durations.json to its command.
SHARD ?=
PART := --splits $(notdir $(SHARD)) --group $(patsubst %/,%,$(dir $(SHARD))) --durations-path tests/durations.json
SELECTED := $(if $(SHARD),-m "slow and not gpu" $(PART),-m "not gpu")
# The image's lock: the same versions without development tools, with the libraries of GPUs
LOCK := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
	--quiet

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all lint bench image pretrained manifests pin lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the locked packages (another Python: PYTHON=/path/to/python3.12)

$(READY): requirements.lock pyproject.toml
	@sh scripts/setup.sh

train: $(READY) ## Fine-tune, with ARGS="experiment=... phases.head.epochs=3"
	$(BIN)/python -m trainer $(ARGS)

test: $(READY) ## Run the quick tests (about 12 minutes on two quiet cores)
	$(BIN)/python -m pytest -n 3 --dist loadfile --durations 30 -m "not slow and not gpu"

test-all: $(READY) ## Run every test that needs no GPU (several hours), or a part of the slow ones: SHARD=1/4
	$(BIN)/python -m pytest -n 2 --dist loadfile --timeout 1800 $(SELECTED)

lint: $(READY) ## Check style, types, layers and YAML (about 2 minutes)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m yamllint --strict .

bench: $(READY) ## Measure against plain Keras and TensorFlow, and write docs/performance.md
	$(BIN)/python -m benchmarks $(ARGS)

image: ## Build the image: IMAGE=registry/name:tag DEVICE=gpu BUILD="podman build"; or TARGET=tensorboard
	$(BUILD) $(if $(TARGET),--target $(TARGET)) --build-arg DEVICE=$(DEVICE) \
		--build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' trainer/__init__.py)" \
		--build-arg REVISION="$$(git describe --always --dirty --abbrev=12)" --tag $(IMAGE) .

pretrained: $(READY) ## Train the packaged backbone again
	$(BIN)/python pretraining/train.py $(ARGS)

manifests: $(READY) ## Write k8s/job.yaml and k8s/multiworker.yaml from k8s/base and k8s/overlays
	$(BIN)/python scripts/manifests.py

pin: $(READY) ## Pin the images of other projects to the digests of their registries (needs skopeo)
	$(BIN)/python scripts/pin_images.py

lock: $(READY) ## Choose the newest versions that pyproject.toml allows, and write both locks
	$(LOCK) pyproject.toml --upgrade --extra dev --output-file requirements.lock
	$(LOCK) pyproject.toml --constraint requirements.lock --extra gpu --extra onnx --extra serve --output-file requirements-image.lock
	$(LOCK) --group tensorboard --upgrade --constraint requirements.lock --output-file requirements-tensorboard.lock
	@echo "lock: requirements.lock (make setup), requirements-image.lock and requirements-tensorboard.lock (make image) are written"

clean: ## Remove .venv, caches and builds; outputs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
