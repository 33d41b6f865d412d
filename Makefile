# Each target sets up what it needs; `make demo` and `make test` work alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PART ?= yolo detection_metrics detr_features detr_training fisheye motrv2 \
	tracking clips slowfast films
JOBS ?= 2

.PHONY: help demo test docs lab bench clean-check readme hooks
help:
	@echo "make demo   every stage on the built-in world, then outputs/demo/index.html"
	@echo "make test   every notebook and every test"
	@echo "make docs   the site, in outputs/site/html"
	@echo "make lab    JupyterLab on the notebooks"
	@echo "make bench  speed beside the peers, nbs/bench.ipynb; a part: PART=yolo"

$(VENV)/.core: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	@touch $@

# an extra: make .venv/.dev, .venv/.docs, .venv/.lab
$(VENV)/.%: $(VENV)/.core
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[$*]"
	@touch $@

demo: $(VENV)/.core
	$(BIN)/crowdlens demo

test: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests

docs: $(VENV)/.docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python nbs/_site/build.py outputs/site/src
	$(BIN)/sphinx-build -q -W -E -c nbs/_site outputs/site/src outputs/site/html
	@echo "site: outputs/site/html/index.html"

lab: $(VENV)/.lab
	$(BIN)/jupyter lab nbs

bench: $(VENV)/.core
	for p in $(PART); do $(BIN)/python bench/$$p.py || exit 1; done

readme: $(VENV)/.dev
	$(BIN)/python nbs/_site/readme.py

# the package is what the notebooks export, and the notebooks are clean
clean-check: $(VENV)/.dev
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python nbs/_site/readme.py
	git diff --exit-code

hooks:
	git config core.hooksPath .githooks
