# make run [ARGS="model=lenet5 reg=group_hs"], make test, make fuzz, make sanitize, make mutations, make bench: each installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
ARGS ?=

.PHONY: run test fuzz sanitize mutations bench clean

run: $(VENV)/.installed
	$(VENV)/bin/python main.py $(if $(filter data=%,$(ARGS)),,data=digits) $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m "slow or not slow"

fuzz: $(VENV)/.installed-test
	SPARSITY_FUZZ=10000 $(VENV)/bin/python -m pytest -m slow tests/test_fuzz.py

# The kernels' tests with their libraries watched for reads and writes beside arrays, and for what C++ leaves undefined.
sanitize: $(VENV)/.installed-test
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1 SPARSITY_KERNELS=$(VENV)/kernels \
	SPARSITY_KERNELS_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g" \
	$(VENV)/bin/python -m pytest -n 0 tests/test_kernels.py

# Small changes of the kernels' lines, each of which should fail a test.
mutations: $(VENV)/.installed-test
	$(VENV)/bin/python -m benchmarks.mutations

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[all,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache
