PYTHON ?= python
SANITIZERS = address,undefined
# Leaks are Python's own at exit; the runtime comes first because Python was not linked with it.
RUN = OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# Of the simulator, errors end a launch, not the process: some are planted.
RUN_SIMULATOR = $(RUN) ASAN_OPTIONS=detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0
PRELOAD = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)"

.PHONY: native native-cuda sanitize sanitize-cuda sanitize-native

native:  ## build fastcl._C in place
	$(PYTHON) setup.py build_ext --inplace

native-cuda:  ## the same; an error where the CUDA kernels cannot be built
	FASTCL_NATIVE=cuda $(PYTHON) setup.py build_ext --inplace

sanitize: sanitize-native sanitize-cuda  ## the same tests, with AddressSanitizer and UndefinedBehaviorSanitizer

sanitize-cuda:  ## the CUDA kernels on the simulator
	FASTCL_CXXFLAGS="-fsanitize=$(SANITIZERS) -fsanitize-recover=address -fno-sanitize-recover=undefined" \
		$(RUN_SIMULATOR) $(PRELOAD) $(PYTHON) -m pytest -n 0 tests/test_cuda.py

sanitize-native:  ## the primitives on the CPU
	FASTCL_CXXFLAGS="-fsanitize=$(SANITIZERS) -fno-sanitize-recover=all -O1" $(PYTHON) setup.py build_ext --inplace
	$(RUN) $(PRELOAD) $(PYTHON) -m pytest -n 0 tests/test_native.py tests/test_pairwise.py -k "not triton and not chunked and not compiled" \
		; status=$$?; $(MAKE) native; exit $$status

.PHONY: check docs scoreboard tables

check:  ## everything that must hold before a change goes in, in a new environment
	.ci/run

scoreboard:  ## prove every promise that this machine can prove, and write docs/reliability.md
	$(PYTHON) -m benchmarks.scoreboard; status=$$?; $(PYTHON) -m benchmarks.render; exit $$status

tables:  ## tables and pictures of README.md and docs/ from the committed records
	$(PYTHON) -m benchmarks.render
	$(PYTHON) -m benchmarks.pictures

docs:  ## the documentation as a site, in site/: strict, and without a network
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

SOURCES = $(shell find csrc -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: lint format

lint:  ## style and simple mistakes, of Python and of C++
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(SOURCES)

format:  ## mends what lint would say of style
	ruff check --fix
	ruff format
	clang-format -i $(SOURCES)

RESULT ?= benchmarks/results/$(shell $(PYTHON) -c "import torch; print(torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else 'no-gpu')").json
MINUTES ?= 8
# Most of the time of these tests goes into compiling kernels: by several processes, where pytest-xdist is installed.
WORKERS ?= 8
XDIST ?= $(shell $(PYTHON) -c "import xdist; print('-n $(WORKERS) --maxprocesses $(WORKERS)')" 2> /dev/null || echo -o addopts=-q)

.PHONY: gpu gpu-test gpu-bench

gpu: gpu-test gpu-bench  ## everything that only a CUDA device can show

gpu-test:  ## numerics, determinism, streams, graphs; then the kernels under compute-sanitizer, where it works
	@if $(PYTHON) -c "import setup; setup.find_nvcc()" 2> /dev/null; then $(MAKE) native-cuda; \
	else echo "nvcc was not found: CUDA C++ kernels are tested only where they are installed already"; fi
	-$(PYTHON) -m benchmarks.probe --workers $(WORKERS)
	$(PYTHON) -m pytest $(XDIST) tests/test_gpu.py tests/test_triton.py tests/test_functional.py::test_low_precision_is_no_worse_than_torch
	@if command -v compute-sanitizer > /dev/null; then \
		for tool in memcheck racecheck synccheck initcheck; do \
			PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) -m benchmarks.sanitized || exit 1; \
		done; \
	else echo "compute-sanitizer is not installed: out-of-bounds accesses are looked for by guard bands only"; fi

gpu-bench:  ## against other libraries; run it again to go on where it stopped
	$(PYTHON) -m benchmarks.gpu --json $(RESULT) --minutes $(MINUTES)
	$(PYTHON) -m benchmarks.ledger
