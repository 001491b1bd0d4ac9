# Every target does its own set-up in .venv; all it needs is Python 3.11 or newer and make.
#   make demo PIP_ARGS="--index-url ..."     chooses a package index (a CPU-only build of torch, say)
#   make demo PYTHON=python3.12              chooses the Python
#   make demo OMP_NUM_THREADS=4              chooses the number of threads
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS)
PIP_DOWNLOAD = $(VENV)/bin/python -m pip download --disable-pip-version-check $(PIP_ARGS)
RUN = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# torchrun sets one thread when the variable is unset. torch counts physical cores; more than 8 do not help matrices this small.
THREADS = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(VENV)/bin/python -c "import torch; print(min(8, torch.get_num_threads()))")}
ONE_THREAD = OMP_NUM_THREADS=1
# --standalone takes a free port, so that two trainings on one machine do not meet.
TORCHRUN = torchrun --standalone

# Without the speech extra (see the set-up below) the demo goes on with tones.
VOICES = $$($(VENV)/bin/python -c "import espeakng_loader" 2>/dev/null || echo --data.demo.voices=tones)

.PHONY: help demo record test smoke bench bench-gpu demo-gpu-prepare demo-gpu demo-gpu-evaluate lint
# A failed set-up leaves no half-made target behind.
.DELETE_ON_ERROR:

help:
	@echo "make demo   trains a model on everything and writes its report (a quarter of an hour on 2 cores)"
	@echo "make record trains and scores the demo with five seeds, one after the other (SEEDS=2 CONFIG=configs/demo-long.toml)"
	@echo "make test   runs the tests"
	@echo "make smoke  trains a tiny model on 2 ranks, evaluates it and takes a sample (a few minutes)"
	@echo "make bench  measures training speed and memory beside transformers' Qwen3, and litgpt's and torchtitan's where installed"
	@echo "make bench-gpu  checks and times every kernel on this machine's GPU, in nine minutes, with the Python that PYTHON names"
	@echo "make demo-gpu-prepare, demo-gpu, demo-gpu-evaluate  a larger demo: codes made here, eight minutes on a GPU, judged here"
	@echo "make lint   runs ruff"

demo: $(VENV)/.demo
	$(RUN) $(THREADS) $(TORCHRUN) train.py configs/demo.toml $(VOICES)
	$(RUN) $(THREADS) python -m onevocab.evaluation runs/demo
	$(RUN) $(THREADS) python -m onevocab.demo.check runs/demo
	@echo "The page: file://$(CURDIR)/runs/demo/report/index.html"

record: $(VENV)/.demo
	$(RUN) $(THREADS) python -m benchmarks.record $(or $(CONFIG),configs/demo.toml) --seeds $(or $(SEEDS),5) $(VOICES)

test: $(VENV)/.dev
	$(RUN) python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

smoke: $(VENV)/.demo
	$(RUN) $(ONE_THREAD) $(TORCHRUN) --nproc-per-node 2 train.py configs/smoke.toml
	$(RUN) $(THREADS) python -m onevocab.evaluation runs/smoke
	$(RUN) python sample.py runs/smoke --text "Draw a red apple." --want image --out runs/smoke/sample

bench: $(VENV)/.dev
	$(RUN) $(THREADS) python -m benchmarks.train_step --device cpu --seconds 30 --out benchmarks/results/train_step-cpu.json

# No set-up: a bare CUDA image with torch, triton, numpy and einops is enough.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu --out $(or $(OUT),runs/bench-gpu) $(BENCH_ARGS)

# Here: the codes, and the wheels that a CUDA image with Python 3.12 lacks. There, without a network: the training. Here again.
GPU ?= runs/gpu
demo-gpu-prepare: $(VENV)/.demo
	$(RUN) $(THREADS) python -m onevocab.pipeline.away prepare configs/hopper.toml --out $(GPU) $(VOICES)
	$(PIP_DOWNLOAD) --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
	  --platform manylinux2014_x86_64 --dest $(GPU)/wheels --requirement $(GPU)/requirements.txt

demo-gpu:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(GPU)/site $(GPU)/wheels/*.whl
	ln -sfn "$(CURDIR)" $(GPU)/site/onevocab
	PYTHONPATH="$(abspath $(GPU))/site" $(PYTHON) -m onevocab.pipeline.away train $(GPU)/run.tar.xz runs/hopper \
	  --minutes $(or $(MINUTES),8) --out $(or $(OUT),$(GPU)/trained) --data.workers=16

demo-gpu-evaluate: $(VENV)/.demo
	$(RUN) python -m onevocab.pipeline.away take $(or $(OUT),$(GPU)/trained) runs/hopper
	$(RUN) $(THREADS) python -m onevocab.evaluation runs/hopper

lint: $(VENV)/.dev
	$(RUN) ruff check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is missing or older than Python 3.11; choose one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; install its venv package or choose another with PYTHON=..." >&2; exit 1; }

# All at once; where that fails, one by one, and the two that not every system can install may be missing.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@$(PIP) -e '.[demo,speech,judge]' || { $(PIP) -e '.[demo]' && \
	  { $(PIP) -e '.[speech]' || echo "note: the speech extra (eSpeak NG) did not install; going on with tones instead of voices"; } && \
	  { $(PIP) -e '.[judge]' || echo "note: the judge extra (pocketsphinx) did not install; going on without the judge of speech"; }; }
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(PIP) -e '.[dev]'
	@touch $@
