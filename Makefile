# One virtual environment in .venv holds everything. A stamp file in it is older than what it was made
# from when it must be brought up to date, so every target below can be the first one you type.

TORCH_SPEC ?= torch==2.13.0
# More for the two pip calls, such as where to find builds of torch for your machine.
TORCH_PIP_ARGS ?=
# What stands before the names of images, like the chart's image.registry; more for docker, such as --push.
IMAGE_REGISTRY ?=
IMAGE_ARGS ?= --load
PIP_ARGS ?=
ARGS ?=
# Processes that run tests. Two keep two cores busy; ARGS=-n0 runs all in one, for a debugger.
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	"$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && { echo "$$candidate"; break; }; done)
PACKAGES := core telemetry rpc engine kvtransfer worker prefill decode router diptych

.DEFAULT_GOAL := help
.PHONY: help serve chat test check lint type imports fmt proto proto-check chart dashboards \
	dashboards-check images kind bench install clean distclean

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

serve: $(VENV)/.installed ## Start the whole system on this machine; ARGS="--prefill 2 --decode 2" passes options on
	@exec $(BIN)/diptych serve $(ARGS)

chat: $(VENV)/.installed ## Chat with what `make serve` started
	@exec $(BIN)/diptych chat $(ARGS)

test: $(VENV)/.installed-dev ## Run all tests; ARGS="tests/unit -k name" chooses
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

check: lint type imports proto-check dashboards-check ## All that needs no test run: lint, types, imports, fresh files

lint: $(VENV)/.installed-dev ## Style, format and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(PACKAGES) benchmarks deploy proto scripts tests docs *.md

type: $(VENV)/.installed-dev ## Types, strictly
	$(BIN)/mypy

imports: $(VENV)/.installed-dev ## Imports between packages only go down
	$(BIN)/lint-imports

fmt: $(VENV)/.installed-dev ## Format, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.installed-dev ## Generate rpc/v1 from proto/
	$(BIN)/python scripts/generate_stubs.py

proto-check: $(VENV)/.installed-dev ## Are the stubs in rpc/v1 those of proto/?
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BIN)/python scripts/generate_stubs.py "$$fresh" && \
	diff -r -x __init__.py -x __pycache__ "$$fresh/rpc/v1" rpc/v1 || \
	{ echo 'rpc/v1 is stale: run make proto and commit the result.'; exit 1; }

chart: $(VENV)/.installed-dev ## Make what is made of the Helm chart: schema, reference of values, golden renderings
	PYTHONPATH=. $(BIN)/python scripts/build_chart.py

dashboards: $(VENV)/.installed-dev ## Build dashboards, alert rules and docs/metrics.md from the metrics in the code
	$(BIN)/python -m scripts.dashboards

dashboards-check: $(VENV)/.installed-dev ## Are they those of the code?
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BIN)/python -m scripts.dashboards --root "$$fresh" && \
	diff -r "$$fresh/deploy/helm/diptych/dashboards" deploy/helm/diptych/dashboards && \
	diff -r "$$fresh/deploy/helm/diptych/rules" deploy/helm/diptych/rules && \
	diff "$$fresh/docs/metrics.md" docs/metrics.md || \
	{ echo 'Dashboards are stale: run make dashboards and commit the result.'; exit 1; }

IMAGES ?= router worker-cpu worker
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

images: ## Build the images of Kubernetes' pods, or print how where there is no docker; IMAGES="router" chooses
	@docker buildx version >/dev/null 2>&1 && run=1 || run=; for image in $(IMAGES); do \
	set -- docker buildx build --file deploy/images/Dockerfile --target "$$image" \
	--build-arg VERSION=$(VERSION) --build-arg "REVISION=$$(git rev-parse HEAD 2>/dev/null)" \
	--tag "$(IMAGE_REGISTRY:%=%/)diptych/$$image:$(VERSION)" $(IMAGE_ARGS) .; \
	echo "$$@"; test -z "$$run" || "$$@" || exit; done; \
	test -n "$$run" || { echo 'Printed only: `docker buildx` does not work here.' >&2; exit 1; }

kind: ## The whole system in a kind cluster without GPUs; needs docker, kind, kubectl and helm
	@scripts/kind.sh

bench: $(VENV)/.installed-dev ## Benchmarks against Hugging Face transformers; minutes
	$(BIN)/python -m benchmarks.local_system $(ARGS)

install: $(VENV)/.installed-dev ## Make or update .venv with everything, and install the git hooks
	$(BIN)/pre-commit install

clean: ## Remove caches and build output; keeps .venv and converted models
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find $(PACKAGES) benchmarks scripts tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)

# Torch first and alone: resolved together with the rest, pip may replace a build without CUDA that
# is already there, or that TORCH_PIP_ARGS point at, by the (far larger) one with CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'Diptych needs Python 3.11 or newer with the venv module' \
	'(Debian and Ubuntu: package python3-venv). Name one with: make PYTHON=/path/to/python3'; exit 1; }
	@test -x $(BIN)/python || { echo '==> making $(VENV)'; "$(PYTHON)" -m venv $(VENV); }
	@echo '==> installing $(TORCH_SPEC) (once; the largest part)'
	@$(PIP) $(TORCH_PIP_ARGS) '$(TORCH_SPEC)' numpy
	@echo '==> installing Diptych and what it needs'
	@$(PIP) $(PIP_ARGS) -e '.[router,worker,nixl]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo '==> installing what tests and checks need'
	@$(PIP) $(PIP_ARGS) -e '.[router,worker,nixl,mooncake,tracing,dev]'
	@touch $@
