# GNU make on Linux and macOS. `make` alone lists the targets.
#   PYTHON=python3.12  the interpreter for .venv (3.10 to 3.13); a .venv of another one is made anew
#   ARGS="..."         goes to the command that the target runs
#   KIT_PYTHON, KIT_TORCH, KIT_TRITON   those of the machine that gpu-kit builds for
# PWM_FAST_BUILD, PWM_FAST_CUDA, PWM_FAST_CUDA_ARCHS, NVCC, CUDA_HOME, CXX, CXXFLAGS and LDFLAGS reach
# setup.py; another value installs again, and so does an nvcc or an NVIDIA driver that comes or goes.

SHELL := /bin/sh
PYTHON ?= python3
ARGS ?=

RUN := .venv/bin/python -m
INPUTS := pyproject.toml setup.py constraints.txt csrc $(wildcard csrc/* csrc/*/*)
# Prints the version and the home of a Python, and fails if pwm_fast does not support it.
PROBE := -c 'import sys; v = sys.version_info[:2]; print("%d.%d of %s" % (v + (sys.base_prefix,))); \
	sys.exit(not (3, 10) <= v <= (3, 13))'

# The pip that .venv gets before anything else: those that Pythons bring go back through old releases
# where they should look for another one. With constraints.txt the oldest that works is OLDEST_PIP.
PIP := 25.1
OLDEST_PIP := 22
# What setup.py looks at too (DRIVER_FILES).
DRIVER_FILES := /proc/driver/nvidia/version /dev/nvidiactl /dev/nvhost-gpu /dev/dxg

.PHONY: help setup train test test-quick bench gpu gpu-kit lint docs clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 picks the interpreter, ARGS="..." goes to the command that is run.'

setup: .venv/.installed ## create .venv and install pwm_fast into it, unless that is done already

train: setup ## train; without ARGS the quickstart, else Hydra overrides: ARGS="seed=1"
	$(RUN) pwm_fast.train $(ARGS)

# A file's tests run in one process, files in the order of tests/conftest.py; ARGS="-n0 ..." starts none.
test: setup ## run the tests, on every core
	$(RUN) pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# What differs between Pythons shows here, if anywhere; .ci/run does it with every one that there is.
QUICK := $(addprefix tests/,data envs test_config.py test_make_setup.py test_replay.py \
	$(patsubst %,launch/test_%.py,options resources submit) \
	$(patsubst %,native/test_%.py,arguments build_options cuda_build) \
	$(patsubst %,ops/test_%.py,compile docs errors explain imports operator select two_hot vmap) \
	$(patsubst %,run/test_%.py,checkpoint collection evaluation files metrics offline provenance train))

test-quick: setup ## run the part of the tests that CI runs on every Python
	$(RUN) pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not slow and not interpreted' \
		$(QUICK) $(ARGS)

bench: setup ## run the benchmarks
	$(RUN) pytest bench --benchmark-only $(ARGS)

gpu: ## check and measure with a GPU, with the Python and torch that are installed
	$(PYTHON) -m bench.gpu $(ARGS)

# Triton's cache serves this Triton on this Python alone. Its keys hold nothing of torch, so a build for
# CPUs is enough: KIT_TORCH=2.11.0+cpu PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
KIT_PYTHON ?= python3.12
KIT_TORCH ?= 2.11.0
KIT_TRITON ?= 3.6.0
KIT := build/kit-$(subst /,_,$(KIT_PYTHON))-$(KIT_TORCH)-$(KIT_TRITON)

gpu-kit: $(KIT)/.installed ## build without a GPU, for one, what `make gpu` would compile there
	$(KIT)/bin/python -m bench.prepare $(ARGS)

$(KIT)/.installed:
	@"$(KIT_PYTHON)" -c '' 2>/dev/null || { \
		echo "error: $(KIT_PYTHON) does not run; name that machine's Python," \
			'as in "make gpu-kit KIT_PYTHON=/path/to/python3.12"' >&2; exit 1; }
	@echo 'makes $(KIT): torch $(KIT_TORCH) takes 5 GB with the CUDA that PyPI adds to it'
	@rm -rf $(KIT)
	$(KIT_PYTHON) -m venv $(KIT)
	$(KIT)/bin/pip install -q --disable-pip-version-check torch==$(KIT_TORCH) triton==$(KIT_TRITON) \
		numpy pybind11 ninja setuptools
	@touch $@

lint: setup ## check style, types and the direction of imports
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	PYTHONPATH=. .venv/bin/lint-imports --no-cache

docs: setup ## build the documentation's site into build/docs; a warning is an error
	@$(RUN) sphinx --version >/dev/null 2>&1 || { \
		echo 'error: Sphinx is not installed: .venv/bin/python -m pip install -c constraints.txt -e ".[docs]"' >&2; \
		exit 1; }
	$(RUN) sphinx -q -W --keep-going -b html docs build/docs $(ARGS)

clean: ## remove .venv, builds and caches; runs stay
	rm -rf .venv build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache
	rm -f pwm_fast/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so an interrupted install is taken up again.
.venv/.installed: .venv/.key $(INPUTS)
	@rm -f pwm_fast/_C.*.so
	@$(RUN) pip --version >/dev/null 2>&1 || $(RUN) ensurepip
	@log=$$($(RUN) pip install -q --disable-pip-version-check --retries 2 'pip>=$(PIP)' 2>&1) || { \
		why=$$(echo "$$log" | grep -m 1 '^ERROR:'); have=$$($(RUN) pip --version | awk '{ print $$2 }'); \
		if echo "$$have" | awk -F. '{ exit !($$1 < $(OLDEST_PIP)) }'; then \
			echo "error: pip $$have of .venv is too old and there is no newer one ($$why):" \
				".venv/bin/python -m pip install 'pip>=$(PIP)'" >&2; exit 1; fi; \
		echo "NOTE: goes on with pip $$have, for pip $(PIP) or newer could not be installed ($$why)"; }
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@test "$$PWM_FAST_BUILD" = 0 || ls pwm_fast/_C.*.so >/dev/null 2>&1 || \
		echo 'NOTE: installed without the native extension; "make setup PWM_FAST_BUILD=1" says why.'
	@$(RUN) pwm_fast.info | grep '^native CUDA' || true
	@touch $@

# Changes, and so makes .installed out of date, only when what it records does.
.venv/.key: FORCE
	@have=$$(.venv/bin/python $(PROBE) 2>/dev/null) || have=; want=$$have; \
	if [ -z "$$have" ] || [ '$(origin PYTHON)' != file ]; then \
		want=$$("$(PYTHON)" $(PROBE) 2>/dev/null) || { \
			echo "error: $(PYTHON) is not a Python from 3.10 to 3.13 ($${want:-it does not run});" \
				'name one, as in "make setup PYTHON=python3.12"' >&2; exit 1; }; \
	fi; \
	if [ "$$have" != "$$want" ]; then \
		echo "creating .venv with Python $$want"; \
		"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; \
			echo 'error: this Python cannot create a virtual environment;' \
				'on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }; \
	fi; \
	key="$$want | $$PWD | $$CXX | $$CXXFLAGS | $$LDFLAGS | $${PWM_FAST_BUILD:-auto}"; \
	key="$$key | $${PWM_FAST_CUDA:-auto} | $$PWM_FAST_CUDA_ARCHS | $$CUDA_HOME"; \
	key="$$key | $${NVCC:-$$(command -v nvcc)} | $$(command -v nvidia-smi || ls $(DRIVER_FILES) 2>/dev/null | head -n 1)"; \
	[ "$$key" = "$$(cat $@ 2>/dev/null)" ] || printf "%s\n" "$$key" >$@
