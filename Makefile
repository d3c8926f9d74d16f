# The README's commands. Everything is set up in .venv; nothing else on the machine is touched.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test check bench cifar10 cifar10-guard clean
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

# Its guard, from one half of the test images: evaluate it with --part 2/2.
cifar10-guard: $(STAMP)
	$(VENV)/bin/pathguard pack model_store/cifar10.json --out model_store/cifar10.mar
	$(VENV)/bin/pathguard fit --archive model_store/cifar10.mar --data data/cifar10.zip/test \
		--part 1/2 --out model_store/cifar10-guard

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV)
