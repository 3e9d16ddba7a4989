# `make demo` and `make test`; `make test-v5` and `make test-majors` repeat the tests on transformers 5 and across the
# two majors; `make doctor` says what this machine can run. Each sets up the virtual environments that it needs first.
PYTHON ?= python3
VENV ?= .venv
VENV5 ?= .venv5
# Processes that run the tests; a file's tests stay together.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo app doctor test test-v5 test-app test-majors check lint types coverage clean

demo: $(VENV)/.ready
	$(VENV)/bin/python demo.py

# make doctor RECIPE=siq-vl-0.5b STAGE=2
RECIPE ?= tiny
STAGE ?= 1
doctor: $(VENV)/.ready
	$(VENV)/bin/python -m siq_vl.planning.doctor --recipe $(RECIPE) --stage $(STAGE)

# A page to talk to the checkpoint that the repo is: `make app`, then the address that it prints.
app: $(VENV)/.app
	$(VENV)/bin/python app.py

test: $(VENV)/.ready
	$(VENV)/bin/python $(PYTEST)

# The same tests, and those of what only transformers 5 has; in a random order, which SEED decides.
SEED ?= $(shell date +%s)
test-v5: $(VENV5)/.ready
	$(VENV5)/bin/python $(PYTEST) --random-order --random-order-seed=$(SEED)

# The same on the newest transformers 5 there is, which may be newer than requirements-v5.txt has it; all else as pinned.
VENV_NEWEST ?= .venv-newest
.PHONY: test-newest
test-newest:
	$(PYTHON) -m venv $(VENV_NEWEST)
	sed 's/^transformers==.*/transformers>=5,<6/' requirements-v5.txt > $(VENV_NEWEST)/requirements.txt
	$(VENV_NEWEST)/bin/python -m pip install -q --disable-pip-version-check -U -r $(VENV_NEWEST)/requirements.txt
	$(VENV_NEWEST)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	$(VENV_NEWEST)/bin/python $(PYTEST)

# What only a machine with a GPU can say, in at most 35 minutes: docs/gpu.md and docs/results/gpu.json. Without a GPU:
# `benchmarks/gpu.py --device cpu --quick` rehearses it.
.PHONY: gpu
gpu: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/gpu.py

# Every way to share a training among processes, DeepSpeed's too: on two processes of the CPU.
VENV_DEVICES ?= .venv-devices
.PHONY: test-devices
test-devices: $(VENV_DEVICES)/.ready
	$(VENV_DEVICES)/bin/python -m pytest tests/test_distributed.py

$(VENV_DEVICES)/.ready: requirements.txt requirements-devices.txt
	$(PYTHON) -m venv $(VENV_DEVICES)
	$(VENV_DEVICES)/bin/python -m pip install -q --disable-pip-version-check -r requirements-devices.txt
	touch $@

# The page in a headless browser, on both majors; needs Chromium (Debian: apt-get install chromium).
test-app: $(VENV)/.app $(VENV5)/.app
	SIQ_VL_NEED_BROWSER=1 $(VENV)/bin/python -m pytest tests/test_app.py
	SIQ_VL_NEED_BROWSER=1 $(VENV5)/bin/python -m pytest tests/test_app.py

# The page with no server, for the checkpoint that the repo is: a static folder, outputs/web. Needs Node.
.PHONY: web test-export test-gguf
web: $(VENV)/.export web/node_modules/.ready
	rm -rf outputs/web
	$(VENV)/bin/python export_web.py . outputs/web

# What is exported, in the engines that it is exported to: onnxruntime, Node and, where there is one, a headless browser;
# llama.cpp. Sessions are traced on either major; the rest does not depend on it.
test-export: $(VENV)/.export $(VENV)/.app $(VENV5)/.export web/node_modules/.ready
	SIQ_VL_NEED_EXPORT=1 $(VENV)/bin/python -m pytest tests/test_onnx.py $(if $(shell command -v chromium),tests/test_web.py)
	SIQ_VL_NEED_EXPORT=1 $(VENV5)/bin/python -m pytest tests/test_onnx.py
test-gguf: $(VENV)/.export
	SIQ_VL_NEED_EXPORT=1 $(VENV)/bin/python -m pytest tests/test_gguf.py

# Checkpoints written by one major, read and saved again by the other, read by the first; in both directions.
test-majors: $(VENV)/.ready $(VENV5)/.ready
	SIQ_VL_OTHER_PYTHON=$(abspath $(VENV5))/bin/python $(VENV)/bin/python -m pytest tests/test_majors.py
	SIQ_VL_OTHER_PYTHON=$(abspath $(VENV))/bin/python $(VENV5)/bin/python -m pytest tests/test_majors.py

# What every change has to pass: style, types, tests.
check: lint types test

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The package as it is at run time: the files of the repository root that are its modules linked in beside the others.
TYPES := $(VENV)/types
SCRIPTS := $(filter-out %_siq_vl.py,$(wildcard *.py))
types: $(VENV)/.ready-dev
	rm -rf $(TYPES) && mkdir -p $(TYPES)/siq_vl
	ln -s $(wildcard $(CURDIR)/siq_vl/*) $(CURDIR)/pretraining $(wildcard $(CURDIR)/*_siq_vl.py) $(TYPES)/siq_vl/
	ln -s $(addprefix $(CURDIR)/,$(SCRIPTS)) $(TYPES)/
	cd $(TYPES) && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../.mypy_cache \
		--python-executable $(abspath $(VENV))/bin/python -p siq_vl $(SCRIPTS:%.py=-m %)

# Lines of the library that the tests reach, in processes that they start too; fails below 90%.
coverage: $(VENV)/.ready-dev
	$(VENV)/bin/python $(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html:outputs/coverage

# Changes of the code, one at a time, that some test has to notice: tests/mutations.yaml.
.PHONY: mutants
mutants: $(VENV)/.ready
	$(VENV)/bin/python tests/mutate.py --jobs $(WORKERS)

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV5)/.ready: requirements-v5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install -q --disable-pip-version-check -r requirements-v5.txt
	touch $@

$(VENV)/.app $(VENV5)/.app: %/.app: %/.ready requirements-app.txt
	$*/bin/python -m pip install -q --disable-pip-version-check -r requirements-app.txt
	touch $@

$(VENV)/.export $(VENV5)/.export: %/.export: %/.ready requirements-export.txt
	$*/bin/python -m pip install -q --disable-pip-version-check -r requirements-export.txt
	touch $@

web/node_modules/.ready: web/package-lock.json
	cd web && npm ci --ignore-scripts
	touch $@

clean:
	rm -rf outputs/tiny

# Transformers' own test mixins on both majors, each from the source distribution of its installed release, and what is
# skipped beside what Idefics3 skips. test-hf-4 and test-hf-5 run one major; SIQ_VL_TRANSFORMERS_SOURCE=folder gives them
# another source, such as a checkout of the release, which has the mixins for generation too.
.PHONY: test-hf test-hf-4 test-hf-5
test-hf: test-hf-4 test-hf-5
test-hf-4: HF_VENV := $(VENV)
test-hf-5: HF_VENV := $(VENV5)
test-hf-4: $(VENV)/transformers-source
test-hf-5: $(VENV5)/transformers-source
test-hf-4 test-hf-5:
	SIQ_VL_TRANSFORMERS_SOURCE=$(or $(SIQ_VL_TRANSFORMERS_SOURCE),$(abspath $(HF_VENV))/transformers-source) \
		$(HF_VENV)/bin/python -m pytest -q -o addopts= -p no:warnings tests/test_hf_mixins.py

$(VENV)/transformers-source $(VENV5)/transformers-source: %/transformers-source: %/.ready
	$*/bin/python -m pip install -q --disable-pip-version-check parameterized==0.9.0
	release=$$($*/bin/python -c "import transformers; print(transformers.__version__)") && \
	$*/bin/python -m pip download -q --no-deps --no-binary :all: -d $* transformers==$$release && \
	rm -rf $@ && mkdir -p $@ && tar -xzf $*/transformers-$$release.tar.gz -C $@ --strip-components 1
	touch $@

# Make the repo the checkpoint that `make demo` left after stage 3, and keep what it measured.
.PHONY: root
root:
	cp outputs/tiny/stage3/*.json outputs/tiny/stage3/model.safetensors .
	cp outputs/tiny/stage3/training_log.jsonl .
	cp outputs/tiny/results.json docs/results/demo.json

# The real path, every command of it, against a Hub of miniatures on this machine, from empty caches; on both majors. The
# quick form is one size and one teacher; it is among the tests, too. FOLDER=... goes on with an earlier walk.
.PHONY: rehearsal rehearsal-quick
rehearsal rehearsal-quick: $(VENV)/.ready $(VENV5)/.ready
	$(VENV)/bin/python -m rehearsal.walk $(if $(filter %-quick,$@),--quick) $(if $(FOLDER),--folder $(FOLDER)/4)
	$(VENV5)/bin/python -m rehearsal.walk $(if $(filter %-quick,$@),--quick) $(if $(FOLDER),--folder $(FOLDER)/5)
