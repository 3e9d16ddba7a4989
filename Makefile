# Two commands: `make demo` and `make test`. Both set up their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test check clean

demo: $(VENV)/.ready
	$(VENV)/bin/python demo.py

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest

check: $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q ruff==0.17.6
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf outputs/tiny

# Make the repo the checkpoint that `make demo` left after stage 3.
.PHONY: root
root:
	cp outputs/tiny/stage3/*.json outputs/tiny/stage3/model.safetensors .
	cp outputs/tiny/stage3/training_log.jsonl .
