# `make demo` and `make test`; `make test-v5` and `make test-majors` repeat the tests on transformers 5 and across the
# two majors. Each sets up the virtual environments that it needs first.
PYTHON ?= python3
VENV ?= .venv
VENV5 ?= .venv5

.PHONY: demo test test-v5 test-majors check clean

demo: $(VENV)/.ready
	$(VENV)/bin/python demo.py

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest

# The same tests, and those of what only transformers 5 has.
test-v5: $(VENV5)/.ready
	$(VENV5)/bin/python -m pytest

# Checkpoints written by one major, read and saved again by the other, read by the first; in both directions.
test-majors: $(VENV)/.ready $(VENV5)/.ready
	SIQ_VL_OTHER_PYTHON=$(abspath $(VENV5))/bin/python $(VENV)/bin/python -m pytest tests/test_majors.py
	SIQ_VL_OTHER_PYTHON=$(abspath $(VENV))/bin/python $(VENV5)/bin/python -m pytest tests/test_majors.py

check: $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q ruff==0.17.6
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV5)/.ready: requirements-v5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install -q --disable-pip-version-check -r requirements-v5.txt
	touch $@

clean:
	rm -rf outputs/tiny

# Transformers' own test mixins, from the source of the installed release; SIQ_VL_TRANSFORMERS_SOURCE=folder takes
# another source, such as a checkout of the release, which has the mixins for generation too.
SIQ_VL_TRANSFORMERS_SOURCE ?= $(VENV)/transformers-source
.PHONY: test-hf
test-hf: $(SIQ_VL_TRANSFORMERS_SOURCE) $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check parameterized==0.9.0
	SIQ_VL_TRANSFORMERS_SOURCE=$< $(VENV)/bin/python -m pytest -q -o addopts= tests/test_hf_mixins.py

$(VENV)/transformers-source: $(VENV)/.ready
	release=$$($(VENV)/bin/python -c "import transformers; print(transformers.__version__)") && \
	$(VENV)/bin/python -m pip download -q --no-deps --no-binary :all: -d $(VENV) transformers==$$release && \
	mkdir -p $@ && tar -xzf $(VENV)/transformers-$$release.tar.gz -C $@ --strip-components 1

# Make the repo the checkpoint that `make demo` left after stage 3.
.PHONY: root
root:
	cp outputs/tiny/stage3/*.json outputs/tiny/stage3/model.safetensors .
	cp outputs/tiny/stage3/training_log.jsonl .
