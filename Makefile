# make test          environment, format, lint, types, tests
# make test-lowest   the tests with the lowest versions that requirements.txt declares
# make demo          environment, then the main job on a tiny model: see build/demo/report.html
# make clean         remove what these made
PYTHON = python3
OUT = build/demo
VENV = .venv
LOWEST = .venv-lowest
# On the simulated GPU (tests/simulated_gpu/README.md), which has to be there before torch is imported.
GPU_TESTS = PYTHONPATH=tests $(VENV)/bin/python -m pytest -p simulated_gpu.plugin tests/simulated_gpu

test: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n 2
	$(GPU_TESTS) -n 2 -m "not matrix"
	SIMULATED_DEVICES=2 $(GPU_TESTS)/test_second_gpu.py

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest -n 2

demo: $(VENV)/installed
	$(VENV)/bin/python -m trainers demo --out "$(OUT)"

clean:
	rm -rf $(VENV) $(LOWEST) build .pytest_cache .mypy_cache .ruff_cache

# torch first, alone: others must find it there rather than choose a build of their own.
$(VENV)/installed: requirements-test.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

$(LOWEST)/installed: requirements-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lowest.txt
	touch $@

.PHONY: test test-lowest demo clean
