# make         these lines
# make demo    environment, data, training, samples, score, report: some minutes on two cores
# make chat    a small model to talk with, that calls functions: ten minutes on two cores
# make preferences   that model learns which answers are preferred: two minutes more
# make tables  clients of a bank: what a model's states know of who will leave: five minutes
# make test    some minutes of tests, offline, on the CPU; make test-all: all of them
# make bench   what can be measured on this machine
# make lint    ruff and mypy; make clean: what make has installed goes
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALL = python3 -m venv $(VENV) && $(PY) -m pip install -q --no-compile -c constraints.txt -e
CONFIG = config/quickstart.py
RUN = out/quickstart
# methods as sympy has many, each up to the empty line behind it
SAMPLES = --prompt '    def _eval_' --stop '["\n\n"]' --temperature 0.5 --num_samples 6

.PHONY: help demo chat preferences tables test test-all bench lint clean

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

demo: $(VENV)/.core
	$(PY) prepare.py $(CONFIG)
	$(PY) train.py $(CONFIG)
	$(PY) sample.py --ckpt $(RUN) $(SAMPLES) --save
	$(PY) eval.py --ckpt $(RUN) --tasks= --baselines
	$(PY) report.py $(RUN)
	@echo
	@echo 'Look at   $(RUN)/report.html'
	@echo 'Then try  $(PY) sample.py --ckpt $(RUN) --prompt "class Matrix"'
	@echo 'Own text  $(PY) prepare.py $(CONFIG) --dataset=mine --sources=my.txt'
	@echo '          $(PY) train.py $(CONFIG) --dataset=mine --out_dir=out/mine'

chat: $(VENV)/.core
	$(PY) prepare.py config/chat.py --show=2
	$(PY) train.py config/chat.py
	$(PY) eval.py --ckpt out/chat --tasks=dialogs:embedded
	printf '%s\n' 'My name is Tara.' 'Hi. How much is 17 times 23?' 'Ok. Who am I?' /reset \
		'Well, which weekday is 2012-07-21?' /reset 'Spell the word lovi.' 'Thank you.' \
		| $(PY) sample.py --ckpt out/chat --chat --tools=runs/chat_tools.py --temperature=0
	@echo
	@echo 'Talk      $(PY) sample.py --ckpt out/chat --chat --tools=runs/chat_tools.py'

preferences: $(VENV)/.core out/chat/run.json
	$(PY) prepare.py config/dpo.py --show=2
	$(PY) train.py config/dpo.py
	$(PY) train.py config/orpo.py
	$(PY) eval.py --ckpt out/chat --tasks= --data=preference
	$(PY) eval.py --ckpt out/dpo --tasks=
	$(PY) eval.py --ckpt out/orpo --tasks=
	$(PY) report.py out/dpo out/orpo
	@echo
	@echo 'Look at   out/dpo/report_with_orpo.html'
	@echo 'Talk      $(PY) sample.py --ckpt out/dpo --chat'

tables: $(VENV)/.probe
	$(PY) prepare.py config/transactions.py --show=1
	$(PY) train.py config/transactions.py
	$(PY) train.py config/transactions.py --out_dir=out/untrained --max_steps=1 --warmup_steps=0 \
		--learning_rate=1e-9 --min_lr=0 --eval_tokens=1024 --sample_tokens=0
	for run in transactions untrained; do $(PY) sample.py --ckpt out/$$run --embed=mean --layers=1: \
		--prompts data/transactions --out out/$$run/clients.parquet || exit; done
	$(PY) -m plainllama.text.embedded_table out/labels.csv out/sums.csv
	$(PY) eval.py --probe --embeddings out/transactions/clients.parquet --ckpt out/transactions \
		--against out/untrained/clients.parquet,out/sums.csv \
		--labels out/labels.csv --id client --label leaves
	$(PY) report.py out/transactions
	@echo
	@echo 'Look at   out/transactions/report.html'

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m ''

bench: $(VENV)/.test $(RUN)/report.html
	$(PY) bench/all.py

out/chat/run.json:
	$(MAKE) chat

$(RUN)/report.html:
	$(MAKE) demo

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info

$(VENV)/.core: pyproject.toml constraints.txt
	$(INSTALL) . && touch $@

$(VENV)/.probe: pyproject.toml constraints.txt
	$(INSTALL) '.[probe]' && touch $@ $(VENV)/.core

$(VENV)/.test: pyproject.toml constraints.txt
	$(INSTALL) '.[test]' && touch $@ $(VENV)/.core $(VENV)/.probe

$(VENV)/.dev: pyproject.toml constraints.txt
	$(INSTALL) '.[dev]' && touch $@ $(VENV)/.core $(VENV)/.probe $(VENV)/.test
