# Commands for users and developers. The targets create the virtual environment and reuse it.
#   make demo   the whole system on a small data set of coloured shapes, in a few minutes on a CPU
#   make photos FOLDER=... CAPTIONS=...   train on photos of your own, from published weights; 6,000 take 40 minutes
#               FROM=nothing          without them
#   make study  the paper's claim in small: one frame for appearance, four for motion; 10 minutes
#   make test   the tests        make test-all   with those that take minutes
#   make test-newest   the tests with the newest timm and transformers on PyPI, beyond the bounds of setup.cfg
#   make packages  system packages of some tests, by apt-get, as root: a browser, Slurm, sshd ...; without them these tests are skipped
#   make servers   only the object stores of the tests
#   make lint   style and types  make clean      remove what these targets made

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
READY := $(VENV)/.ready
# CUDA version of torch and DALI: cuda12 or cuda13, by the driver (both run without a GPU). An environment keeps its
# version. EXTRAS can be reduced, for example to cuda13.
INSTALLED := $(shell cat $(READY) 2>/dev/null)
DALI ?= $(or $(INSTALLED),cuda13)
ifeq ($(filter cuda12 cuda13,$(DALI)),)
$(error DALI=$(DALI) does not exist: take cuda12 (driver 525 or newer) or cuda13 (driver 580 or newer))
endif
ifneq ($(filter-out $(DALI),$(INSTALLED)),)
ifneq ($(MAKECMDGOALS),clean)
$(error $(VENV) holds the builds for $(INSTALLED): `make clean` first, or install beside it, VENV=.venv-$(DALI))
endif
endif
EXTRAS ?= $(DALI),s3,gcs,wandb,weights,dev
DEMO ?= demo
STUDY ?= study
PHOTOS ?= photos

BIN := $(abspath $(VENV))/bin
# S3 and GCS servers of the tests; tests/object_stores.py finds them by TEST_SERVERS.
SERVERS ?= .venv-servers
SERVERS_READY := $(SERVERS)/.ready
export TEST_SERVERS := $(abspath $(SERVERS))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --constraint constraints-$(DALI).txt
export PATH := $(BIN):$(PATH)

# Programs of the tests that pip does not have. `make test` skips the tests whose programs are missing, and lists them.
# PROGRAM, or PROGRAM:PACKAGE if the package has another name; or FILE:PACKAGE.
PACKAGES := chromium pdsh ssh:openssh-client sshd:openssh-server ip:iproute2 nft:nftables munged:munge sbatch:slurm-wlm mpirun:openmpi-bin zsh fish
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)

# Most tests wait for their own processes and servers: three files at a time keep two cores busy. tests/conftest.py
# orders the files.
JOBS ?= 3
NEWEST ?= .venv-newest
SIDE_BY_SIDE := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help install servers packages demo photos study test test-all test-newest lint format clean

help:
	@sed -n 's/^#  *make/make/p' Makefile

install: $(READY)

$(READY): setup.cfg constraints.txt constraints-$(DALI).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing into $(VENV) (3.3 GB without CUDA) ..."
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv --quiet $(VENV) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	@$(PIP) pip setuptools wheel ninja
	@$(PIP) torch torchvision numpy
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	@echo $(DALI) > $(READY)

servers: $(SERVERS_READY)

$(SERVERS_READY): tests/servers.txt $(READY)
	@echo "Installing the tests' object stores into $(SERVERS) ..."
	@$(BIN)/python -m venv $(SERVERS) || $(BIN)/python -m virtualenv --quiet $(SERVERS) || { $(PIP) virtualenv && $(BIN)/python -m virtualenv --quiet $(SERVERS); }
	@$(SERVERS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement tests/servers.txt
	@touch $(SERVERS_READY)

demo: $(READY)
	@bash launch/demo.sh $(DEMO)

study: $(READY)
	@bash launch/study.sh $(STUDY)

photos: $(READY)
	@bash launch/photos.sh "$(FOLDER)" "$(CAPTIONS)" "$(TEST)" "$(PHOTOS)" "$(FROM)"

packages:
	@missing=$$(PATH=$$PATH:/usr/sbin:/sbin; for name in $(PACKAGES); do [ -f $${name%:*} ] || command -v $${name%:*} >/dev/null || echo $${name#*:}; done); \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "There is no apt-get here; install by other means what Debian calls:" $$missing >&2; exit 2; }; \
	echo "Installing for the tests:" $$missing; \
	$(AS_ROOT) apt-get update -qq && $(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null

test: $(READY) $(SERVERS_READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: $(READY) $(SERVERS_READY)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-newest: $(READY)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade --no-deps --target $(NEWEST) timm transformers
	PYTHONPATH=$(abspath $(NEWEST)) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" tests/preprocessing tests/model tests/loaders tests/eval tests/train

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy runtime storage sharding preprocessing loaders model train eval launch

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(SERVERS) $(NEWEST) $(DEMO) build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
