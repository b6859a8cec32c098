# make test          environment, format, lint, types, tests (all but those marked slow)
# make test-all      the same with every test, the slow ones and the whole GPU matrix too
# make test-cpu      the tests as on another CPU: CPU=default (no AVX2), avx2 or avx512, and THREADS=1 or 2
# make gpu-matrix    all tests of the simulated GPU, two of them; writes a dated file into tests/benchmarks/results (45 minutes)
# make test-lowest   the tests with the lowest versions that requirements.txt declares
# make demo          environment, then the main job on a tiny model: see build/demo/report.html
# make clean         remove what these made
PYTHON = python3
OUT = build/demo
VENV = .venv
LOWEST = .venv-lowest
# On the simulated GPU (tests/simulated_gpu/README.md), which has to be there before torch is imported.
GPU_TESTS = PYTHONPATH=tests $(VENV)/bin/python -m pytest -p simulated_gpu.plugin tests/simulated_gpu
# All processes of tests run, whatever the first one finds; the last one has two GPUs.
RUN_TESTS = failed=0; \
	$(VENV)/bin/python -m pytest -n $(WORKERS) $(CHOSEN) || failed=1; \
	$(GPU_TESTS) -n $(WORKERS) $(CHOSEN) || failed=1; \
	SIMULATED_DEVICES=2 $(GPU_TESTS)/test_second_gpu.py $(CHOSEN) || failed=1; \
	exit $$failed
WORKERS = 2
CPU = default
THREADS = 1

test test-cpu: CHOSEN = -m "not slow and not matrix"
test test-all: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN_TESTS)

# The kernels of torch, of MKL and of oneDNN are chosen by the CPU; each can be asked for older ones.
test-cpu: export ATEN_CPU_CAPABILITY = $(CPU)
test-cpu: export MKL_ENABLE_INSTRUCTIONS = $(if $(filter default,$(CPU)),SSE4_2,$(if $(filter avx2,$(CPU)),AVX2,AVX512))
test-cpu: export ONEDNN_MAX_CPU_ISA = $(if $(filter default,$(CPU)),SSE41,$(if $(filter avx2,$(CPU)),AVX2,DEFAULT))
test-cpu: export OMP_NUM_THREADS = $(THREADS)
test-cpu: export MKL_NUM_THREADS = $(THREADS)
test-cpu: WORKERS = $(if $(filter 1,$(THREADS)),2,0)
test-cpu: $(VENV)/installed
	$(RUN_TESTS)

gpu-matrix: export SIMULATED_DEVICES = 2
gpu-matrix: $(VENV)/installed
	$(GPU_TESTS) -n $(WORKERS) -p simulated_gpu.result --result tests/benchmarks/results/$$(date +%F)-gpu-matrix-2-cores.json

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

.PHONY: test test-all test-cpu gpu-matrix test-lowest demo clean
