# Everything starts here; `make` alone lists the targets. As root on Debian 12 or 13 each target sets up
# what it needs, once: Debian packages, then .venv from requirements/lock.txt. Set-up talks on stderr, so
# `make -s demo DEMO_ARGS='-o json'` prints the demo's JSON alone.
#   PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS, CLUSTER_ARGS, KIND_ARGS, VM_ARGS   passed on
#   WHEELHOUSE         install from this folder, without a network
#   PYTHON             the interpreter
#   UPGRADE=1          `make lock` takes newer versions

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
SIM := ci/kind-sriov-sim
WHEELHOUSE ?=
export WHEELHOUSE

.PHONY: help setup test demo bench check generate lock wheelhouse clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

setup:
	@deploy/install-packages.sh deploy/debian-packages.txt deploy/debian-packages-test.txt
	@deploy/make-venv.sh

test: setup ## all tests this machine can run (as root: all of them)
	@$(BIN)/pytest $(PYTEST_ARGS)

demo: setup ## the real agent against a simulated node: a pod gets a NIC and gives it back
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.demo $(DEMO_ARGS)

bench: setup ## the budgets, measured: prints ratios, fails on none (`-o json`, `--only NAME`)
	@deploy/install-packages.sh deploy/debian-packages-bench.txt
	@PYTHONPATH=.:$(SIM) $(BIN)/python -m tests.bench $(BENCH_ARGS)

.PHONY: test-vm vm-image vm-shell test-e2e kind-up kind-test kind-down

GO := command -v go >/dev/null || deploy/install-packages.sh deploy/debian-packages-go.txt

test-vm: setup ## tests in emulated nodes with SR-IOV, on kernels of their own (the first run builds an image)
	@deploy/install-packages.sh deploy/debian-packages-vm.txt
	@$(BIN)/pytest tests/vm $(PYTEST_ARGS)

vm-image: setup ## what test-vm and a guest's cluster boot, made once
	@deploy/install-packages.sh deploy/debian-packages-vm.txt
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.guest build

vm-shell: setup ## a shell in such a node (VM_ARGS='--kernel ...'); Ctrl-] leaves it
	@deploy/install-packages.sh deploy/debian-packages-vm.txt
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.guest shell $(VM_ARGS)

.PHONY: image
image: setup ## the agent's image as an OCI tar, without a container engine; prints its path (as root)
	@deploy/install-packages.sh deploy/debian-packages-image-host.txt
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.agent_image

.PHONY: e2e-binaries cluster-up

e2e-binaries: setup ## what test-e2e starts: Kubernetes, containerd and more from their Go modules, the agent's image
	@deploy/install-packages.sh deploy/debian-packages-e2e.txt deploy/debian-packages-vm.txt
	@$(GO)
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.cluster build --kubernetes 1.37 --containerd 2.4
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.cluster build --kubernetes 1.34 --containerd 2.1
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.agent_image

cluster-up: setup ## a real cluster in namespaces of this machine, until Ctrl-C (CLUSTER_ARGS='--nodes 2')
	@deploy/install-packages.sh deploy/debian-packages-e2e.txt
	@$(GO)
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.cluster up $(CLUSTER_ARGS)

test-e2e: setup ## the agents in real clusters: two of this machine's and a guest's (CLUSTERS='machine-1.37')
	@deploy/install-packages.sh deploy/debian-packages-e2e.txt deploy/debian-packages-vm.txt
	@$(GO)
	@CLUSTERS='$(CLUSTERS)' $(SIM)/test-e2e.sh $(PYTEST_ARGS)

kind-up: setup ## a cluster of docker's or podman's by kind, with simulated NICs and the agents (as root)
	@deploy/install-packages.sh deploy/debian-packages-kind.txt
	@$(GO)
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.kind up $(KIND_ARGS)

kind-test: setup ## the end-to-end suite on the cluster of kind-up
	@KND_CLUSTER=kind KND_AGENT_IMAGE=/run/knd-kind/agent.tar $(BIN)/pytest tests/e2e $(PYTEST_ARGS)

kind-down: setup ## that cluster and its devices, gone
	@PYTHONPATH=$(SIM) $(BIN)/python -m kndsim.kind down

CHECKS := check-lint check-format check-types check-layers check-spelling check-shell check-repo
.PHONY: $(CHECKS)

check: $(CHECKS) ## linters, types, layers, house rules (`make -k check` goes on after a failure)

$(CHECKS): setup

check-lint:
	@$(BIN)/ruff check .
check-format:
	@$(BIN)/ruff format --check .
check-types:
	@$(BIN)/mypy
check-layers:
	@PYTHONPATH=$(SIM) $(BIN)/lint-imports --no-cache
check-spelling:
	@$(BIN)/codespell $$(git ls-files)
check-shell:
	@$(BIN)/shellcheck .ci/run $$(git ls-files '*.sh')
check-repo:
	@$(BIN)/pytest -q tests/unit/test_repo.py

generate: setup ## driver/pb from proto/
	@$(BIN)/python proto/generate.py

LOCK := CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --no-config --allow-unsafe \
	--generate-hashes --strip-extras --no-emit-index-url --no-emit-options --no-emit-trusted-host \
	--no-emit-find-links --newline lf

lock: setup ## requirements/lock.txt from pyproject.toml, and its part for run time, runtime.txt
	@$(LOCK) --extra dev $(if $(UPGRADE),--upgrade) -o requirements/lock.txt pyproject.toml
	@$(LOCK) --no-annotate -c requirements/lock.txt -o requirements/runtime.txt pyproject.toml
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && deploy/make-wheelhouse.sh "$$folder"

wheelhouse: setup ## wheels for CPython 3.11 and 3.13, to set up elsewhere without a network
	@deploy/make-wheelhouse.sh wheelhouse

clean: ## remove what make made in this folder
	@if [ -L .venv ]; then rm .venv; fi
	@rm -rf .cache build dist wheelhouse *.egg-info .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
