# The README's commands. Everything is set up in .venv; nothing else on the machine is touched.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test check bench benchmark cifar10 clean
demo: $(STAMP)
	$(VENV)/bin/pathguard demo

test: check
	$(VENV)/bin/pytest

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(VENV)/bin/pathguard bench

# The shipped backbone as an archive, and guarded; needs no data.
cifar10: $(STAMP)
	$(VENV)/bin/pathguard pack model_store/cifar10.json --out model_store/cifar10.mar
	$(VENV)/bin/pathguard wrap model_store/cifar10.mar --guard model_store/cifar10-guard \
		--out model_store/cifar10-guarded.mar

# Every table of benchmarks/detection.*, and the shipped guard as they judge it; takes data and time.
benchmark: $(STAMP)
	$(VENV)/bin/pathguard pack model_store/cifar10.json --out model_store/cifar10.mar
	$(VENV)/bin/pathguard benchmark --archive model_store/cifar10.mar \
		--data data/cifar10.zip/test --witness model_store/cifar10-witness.json \
		--surrogate model_store/cifar10-small.json \
		--surrogate model_store/cifar10-invertible.json --guard model_store/cifar10-guard

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV)
