# Imago. `make` without a target lists the targets. Variables:
#   DATA    data to train on: digits (default), mnist, fashion-mnist, cifar10, cifar100, or your images: a folder, a CSV
#           file, a .zip or .tar, or a URL (https://…, s3://…, gs://…, az://…, hf://datasets/owner/name)
#   NAME    name of the model in the store (default: the name of the data)
#   RECIPE  name in train/recipes/, or a path (default: the recipe with the name of the data, else folder)
#   ROOT    directory with torchvision's data sets; with it, nothing is downloaded
#   STORE   of the bundles: a directory (default: artifacts/store), or s3://bucket/prefix, gs://…, az://…
#   PORT    port of the service (default: 8000)
#   ARGS    more arguments, e.g. ARGS='--trainer.max_epochs 5' or ARGS='--max-batch-size 8'
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

DATA ?= digits
NAME ?=
RECIPE ?=
ROOT ?=
STORE ?= artifacts/store
PORT ?= 8000
ARGS ?=
PYTHON ?= python3
VENV ?= .venv

data := $(patsubst ~/%,$(HOME)/%,$(DATA))
python := $(VENV)/bin/python
run := $(python) -m
named := $(if $(NAME),--name $(NAME))
recipe := $(if $(RECIPE),--recipe $(RECIPE))
root := $(if $(ROOT),--root "$(ROOT)")

# Runs a command that a signal may interrupt. It gets the signals that make passes on, and where it ends with the
# status of a signal, make ends by that signal, too. By itself make would end with 2, as after any other failure. The
# shell ends after make has handled the signal: make fails where its command has ended by then.
interruptible = $(1) & pid=$$!; trap "kill -TERM $$pid" TERM; trap : INT; status=0; \
  wait $$pid || wait $$pid || status=$$?; trap - TERM INT; \
  if ((status > 128)); then kill -$$((status - 128)) $$PPID; sleep 1; fi; exit $$status

##@ Train and serve
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@awk 'BEGIN {print "\nVariables"} /^#   / {print substr($$0, 3)}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.train.lock ## create the virtual environment; update it when the lock file changed

train: setup ## train a model and publish a bundle in the store
	@$(call interruptible,$(run) train run "$(data)" --store "$(STORE)" $(named) $(recipe) $(root) $(ARGS))

serve: setup ## serve a model of the store; if the store is empty, train the built-in digits first
	@if [[ '$(STORE)' != *://* ]] && ! compgen -G '$(STORE)/$(or $(NAME),*)/latest/manifest.json' >/dev/null; then \
	  $(if $(NAME),[ '$(origin DATA)' != file ] || { echo "make: $(STORE) has no model '$(NAME)'; train it first: make train DATA=<data> NAME=$(NAME)" >&2; exit 2; };) \
	  exec $(MAKE) train ARGS=; fi
	@exec $(run) serve --store "$(STORE)" $(if $(NAME),--model $(NAME)) --port $(PORT) $(ARGS)

audit: setup ## find broken, duplicate, leaked and mislabelled images: make audit DATA=…
	@$(run) train audit "$(data)" $(recipe) $(root) $(ARGS)

models: $(if $(filter command% environment%,$(origin OVERLAY)),,setup) ## list the bundles in the store; of a cluster with OVERLAY=…
	@$(if $(filter command% environment%,$(origin OVERLAY)),OVERLAY='$(OVERLAY)' k8s/cluster models,$(run) models list --store "$(STORE)" $(ARGS))

##@ Development
# One worker more than cores, because tests also wait. Each worker takes complete files, because the tests of
# a file share servers and models. Files run in the order of their names, so that long ones do not come last.
test: dev ## run the quick tests: make test [ARGS='tests/serve -k drain']
	@$(run) pytest -m 'not slow' -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 6 \
	  --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: dev ## run the slow tests
	@$(run) pytest -m slow $(ARGS)

bench: dev ## run the benchmarks in their short form (10 minutes): make bench [ARGS='--only serve_speed']
	@$(python) tests/benchmarks/bench.py $(ARGS)

bench-full: dev ## run all benchmarks, keep their results, draw the pages (hours)
	@$(python) tests/benchmarks/bench.py --full $(ARGS)

lint: dev ## check style, types, imports and workflows
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "make: some files are not formatted; run: make format" >&2; exit 1; }
	@$(VENV)/bin/lint-imports >/dev/null || $(VENV)/bin/lint-imports
	@$(VENV)/bin/mypy
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml >/dev/null
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml >/dev/null
	@$(VENV)/bin/zizmor --offline --quiet .github

format: dev ## format the code and sort imports
	@$(VENV)/bin/ruff check --select I --fix --quiet .
	@$(VENV)/bin/ruff format --quiet .

dev: $(VENV)/.train.lock $(VENV)/.dev.lock

lock: ## write the lock files from pyproject.toml: make lock [ARGS=--upgrade]
	@[ -x $(python) ] || $(PYTHON) -m venv $(VENV)
	@[ -x $(VENV)/bin/uv ] || $(run) pip install --quiet uv
	@compile() { $(VENV)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --no-emit-index-url \
	  --custom-compile-command 'make lock' --quiet $(ARGS) "$$@"; }; \
	compile --all-extras -o docker/dev.lock; \
	compile --extra train --extra serve --extra parquet -c docker/dev.lock -o docker/train.lock; \
	compile --extra serve -c docker/dev.lock --generate-hashes -o docker/serve.lock; \
	compile --extra serve -c docker/dev.lock --generate-hashes --no-emit-package onnxruntime -o docker/serve-cuda.lock \
	  - < <(sed -n 's/^ *"onnxruntime\(>=[^"]*\)".*/onnxruntime-gpu[cuda,cudnn]\1/p' pyproject.toml); \
	compile --extra serve --extra openvino -c docker/dev.lock --generate-hashes -o docker/serve-openvino.lock

clean: ## delete the virtual environment and the caches, but not the store
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

##@ Containers and Kubernetes
BASE ?= docker.io/library/python:3.11-slim-bookworm
RUNTIME ?= cpu
REGISTRY ?= localhost
TAG ?= $(shell sed -n '/^version/ {s/.*"\(.*\)"/\1/p; q;}' pyproject.toml)
OVERLAY ?= local

images: ## build both images with docker or podman: make images [BASE=…] [RUNTIME=cuda] [REGISTRY=…] [TAG=…]
	@BASE='$(BASE)' RUNTIME='$(RUNTIME)' PREFIX='$(REGISTRY)/imago-' TAG='$(TAG)' docker/build serve train

test-images: dev images ## build both images, train and serve with them, restricted as in a cluster
	@IMAGO_TEST_IMAGES='$(REGISTRY)/imago-serve:$(TAG)$(addprefix -,$(filter-out cpu,$(RUNTIME))) $(REGISTRY)/imago-train:$(TAG)' \
	  BASE='$(BASE)' RUNTIME='$(RUNTIME)' $(run) pytest tests/docker -m slow $(ARGS)

checkov: $(VENV)/checkov/bin/checkov ## install checkov in its own environment; its packages conflict with Imago's
$(VENV)/checkov/bin/checkov:
	@$(PYTHON) -m venv $(VENV)/checkov && $(VENV)/checkov/bin/pip install --quiet --disable-pip-version-check 'checkov==3.3.30'

deploy: ## apply an overlay and wait until it serves: make deploy OVERLAY=local [TRAIN=1: train again] [PUBLISHED=1: no build]
undeploy: ## delete an overlay, but keep its volumes: make undeploy OVERLAY=local [PURGE=1: delete them, too]
logs: ## print the logs of the pods: make logs [FOLLOW=1]
scale: ## set the number of serving replicas: make scale N=3
promote: ## point latest of a cluster's store at a version: make promote VERSION=3 [FORCE=1] [OVERLAY=…] [NAME=…]
rollback: ## point it at the version before: make rollback [VERSION=3] [OVERLAY=…] [NAME=…]
render: ## print the manifests of an overlay: make render OVERLAY=cpu [REGISTRY=…] [TAG=…]
deploy undeploy logs scale promote rollback render:
	@OVERLAY='$(OVERLAY)' PUBLISHED='$(PUBLISHED)' DIGESTS='$(DIGESTS)' N='$(N)' NAME='$(NAME)' VERSION='$(VERSION)' FORCE='$(FORCE)' TRAIN='$(TRAIN)' WAIT_TRAIN='$(WAIT_TRAIN)' PURGE='$(PURGE)' FOLLOW='$(FOLLOW)' \
	  REGISTRY='$(filter-out localhost,$(REGISTRY))' TAG='$(if $(filter file,$(origin TAG)),,$(TAG))' k8s/cluster $@

# The stamp is a copy of the lock file: only a changed lock file, not a newer one, installs again.
$(VENV)/.%.lock: docker/%.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: $(PYTHON) must be Python 3.11 or newer with the venv module (Debian: apt-get install python3-venv);" \
	       "set another with PYTHON=…" >&2; exit 2; }
	@[ -x $(python) ] || $(PYTHON) -m venv $(VENV)
	@cmp -s $< $@ || { echo "Installing $< into $(VENV); the first time takes a few minutes"; \
	  $(run) pip install --quiet --disable-pip-version-check -r $<; \
	  $(run) pip install --quiet --disable-pip-version-check --no-deps --editable .; cp $< $@; }
	@touch $@

.PHONY: help setup train serve audit models test test-slow bench bench-full lint format dev lock clean images test-images checkov \
  deploy undeploy logs scale promote rollback render
