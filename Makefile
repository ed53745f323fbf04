# Everything a developer or user types; CI calls these targets and nothing else.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev run test check lint types imports proto-check protos proto-baseline lock guest kernel bench soak test-agents test-compose up down clean

# The system's own, which every user of the machine can run; a private one may be closed to others.
PYTHON ?= $(shell test -x /usr/bin/python3 && echo /usr/bin/python3 || echo python3)
VENV := .venv
TOOLS := .tools
BIN := $(VENV)/bin
NODE := tests/e2e/node
PROTOS := $(shell find protos -name '*.proto' | sort)

# A package may be followed by :program; having that program is enough.
RUN_PACKAGES := python3-venv ca-certificates qemu-system-x86:qemu-system-x86_64 qemu-utils:qemu-img nftables:nft
COMPOSE_PACKAGES := docker.io:dockerd docker-compose debootstrap
TEST_PACKAGES := $(RUN_PACKAGES) cpio curl e2fsprogs git lz4 zstd docker-registry umoci skopeo buildah openssl busybox-static:busybox nodejs:node npm:npm

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# ---- set-up: each step leaves a stamp that names what it was made from -------------------------

setup: $(VENV)/.run-stamp guest ## Install all that `make run` needs

setup-dev: $(VENV)/.dev-stamp $(TOOLS)/.stamp $(NODE)/node_modules/.stamp guest ## Install all that `make test` and `make check` need

$(VENV)/.run-stamp: requirements.lock pyproject.toml
	@tools/system-packages $(RUN_PACKAGES)
	@echo "Installing the Python packages into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.dev-stamp: requirements-dev.lock $(VENV)/.run-stamp
	@tools/system-packages $(TEST_PACKAGES)
	@echo "Installing the development packages into $(VENV)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(TOOLS)/.stamp: requirements-tools.lock
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(NODE)/node_modules/.stamp: $(NODE)/package-lock.json $(VENV)/.dev-stamp
	@npm ci --silent --prefix $(NODE)
	@touch $@

guest: $(VENV)/.run-stamp ## Build the guest image: kernel, initramfs, agent
	@$(BIN)/python -m services.imager.guest_image --if-needed

kernel: $(VENV)/.run-stamp ## Build the slim kernel from Debian's source, and a guest image with it (10 minutes)
	@$(BIN)/python -m services.imager.slim_kernel
	@$(BIN)/python -m services.imager.guest_image --kernel slim

# ---- use -------------------------------------------------------------------------------------

run: setup ## Set everything up and run the quickstart pipeline
	@$(BIN)/voidbox run examples/quickstart/pipeline.yaml

up: setup ## Start the services in the background
	@$(BIN)/voidbox up

down: ## Stop the services and all boxes
	@if test -x $(BIN)/voidbox; then $(BIN)/voidbox down; fi

# ---- checks ----------------------------------------------------------------------------------

test: setup-dev ## Set everything up and run all tests, VM tests included
	@$(BIN)/pytest tests

check: lint types imports proto-check ## Check style, types, import rules and protos

lint: setup-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup-dev
	@$(BIN)/mypy

imports: setup-dev
	@$(BIN)/lint-imports

proto-check: setup-dev
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@$(BIN)/buf breaking --against protos/baseline.binpb
	@tools/generate-stubs --check $(TOOLS)/bin/python

# ---- generated files -------------------------------------------------------------------------

protos: $(TOOLS)/.stamp ## Generate the stubs from protos/
	@tools/generate-stubs $(TOOLS)/bin/python

proto-baseline: setup-dev ## Make the present protos the ones that later changes must not break
	@$(BIN)/buf build --exclude-source-info -o protos/baseline.binpb

lock: ## Resolve the dependencies anew
	@$(BIN)/python -m pip install -q uv
	@for target in "pyproject.toml --group dev:requirements-dev" "pyproject.toml -c requirements-dev.lock:requirements" "requirements-tools.in:requirements-tools"; do \
		$(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --no-header $${target%:*} -o $${target#*:}.lock; done

# ---- slow things -----------------------------------------------------------------------------

bench: setup-dev ## Measure, each figure beside its floor or a peer
	@tools/system-packages debootstrap
	@$(BIN)/python -m tests.bench

soak: setup-dev ## Prove that nothing leaks: 500 boxes in turn, 64 at once, kills at 90 points (an hour)
	@$(BIN)/python -m tests.soak

test-agents: setup-dev ## Fetch the real agents' programs and run them, in a box and with placeholders (350 MB)
	@VOIDBOX_TEST_AGENTS=1 $(BIN)/pytest tests/integration/test_imager_agents.py tests/integration/test_egress_agents.py

FUZZ ?= layers
FUZZ_SECONDS ?= 60
fuzz: setup-dev ## Fuzz the imager: make fuzz FUZZ=layers|manifests|references|archives FUZZ_SECONDS=60
	@test -d .build/atheris || $(BIN)/python -m pip install -q --disable-pip-version-check --target .build/atheris atheris==3.0.0
	@mkdir -p .build/fuzz-$(FUZZ)
	@PYTHONPATH=.build/atheris:. $(BIN)/python -m tests.fuzz.imager $(FUZZ) -max_total_time=$(FUZZ_SECONDS) .build/fuzz-$(FUZZ)

test-compose: setup-dev ## Test images and the docker-compose stack on a real Docker engine
	@docker compose version >/dev/null 2>&1 || tools/system-packages $(COMPOSE_PACKAGES)
	@VOIDBOX_TEST_COMPOSE=1 $(BIN)/pytest tests/integration/test_imager_docker.py tests/integration/test_compose.py

clean: down ## Remove all that was built in this folder
	@rm -rf $(VENV) $(TOOLS) .build $(NODE)/node_modules .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
