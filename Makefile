PYTHON ?= python
SANITIZERS = address,undefined
# Leaks are Python's own at exit; the runtime comes first because Python was not linked with it.
RUN = OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
PRELOAD = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)"

.PHONY: native sanitize

native:  ## build fastcl._C in place
	$(PYTHON) setup.py build_ext --inplace

sanitize:  ## the tests of the primitives on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	FASTCL_CXXFLAGS="-fsanitize=$(SANITIZERS) -fno-sanitize-recover=all -O1" $(PYTHON) setup.py build_ext --inplace
	$(RUN) $(PRELOAD) $(PYTHON) -m pytest tests/test_native.py tests/test_pairwise.py -k "not triton and not chunked and not compiled" \
		; status=$$?; $(MAKE) native; exit $$status
