# make demo and make test work as the first command on a fresh machine; the environment is made once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
INSTALLED := $(VENV)/.lt_det-installed
export OMP_NUM_THREADS ?= 2
# Threads that wait by spinning cost many times the run on a machine that does something else too.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-fast test-processors lint docs lock upgrade clean

help:
	@echo "make demo   train BALMS on the embedded data set and print its table (five to eight minutes on 2 cores)"
	@echo "make test   run the tests (make test-fast: those of the inner loop, under 90 s)"
	@echo "make test-processors   run them as other processors would: without vectors, with AVX2, 1 and 2 threads"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documents as a site in site/"
	@echo "make lock   pin in requirements.txt what setup.py asks for and it lacks (make upgrade: the newest of all)"

install: $(INSTALLED)

# The wheel's tag names Python 3.10 only, hence --python-version and --target. All packages are compiled once here:
# where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would compile torch and the rest anew.
$(INSTALLED): requirements.txt requirements-detectron2.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode --require-hashes --python-version 3.10 \
		--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		-r requirements-detectron2.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

# Three workers for two cores, of one thread each: a test that waits, for a process or the end of a time, leaves a core.
WORKERS ?= $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))
test test-fast: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

# No training, no processes: what one runs after every change.
FAST := tests/losses tests/data/test_class_statistics.py tests/data/test_convert.py tests/data/test_fractal.py \
	tests/data/test_samplers.py tests/evaluation/test_calibration.py tests/evaluation/test_rle.py tests/io \
	tests/meta/test_learners.py tests/modeling/test_calibrators.py tests/modeling/test_mask_head.py tests/tools/test_cli.py
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest $(FAST)

test-processors: $(INSTALLED)
	$(BIN)/python tools/dev/test_processors.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(INSTALLED)
	$(BIN)/python tools/dev/generate_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Pins what setup.py and requirements.in ask for and the lock lacks; other pins stay (make upgrade moves them).
EXTRAS := test opencv benchmark features vitdet export docs dev
lock:
	$(BIN)/uv pip compile --python-version 3.11 $(EXTRAS:%=--extra %) --no-emit-package opencv-python --quiet \
		--custom-compile-command "make lock" --output-file requirements.txt $(LOCK_FLAGS) setup.py requirements.in

upgrade: LOCK_FLAGS := --upgrade
upgrade: lock

clean:
	rm -rf $(VENV) build dist site *.egg-info
