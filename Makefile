SEED ?= 0
MINUTES ?= 30
PY := .venv/bin/python
STAMP := .venv/.installed
PY_LEROBOT := .venv-lerobot/bin/python
STAMP_LEROBOT := .venv-lerobot/.installed

.PHONY: help setup demo bench test test-lerobot test-zoo test-metaworld identity faults soak check format docs docs-links notebook .docs-tools clean

help:
	@echo "make demo [SEED=0]   improve a frozen flow policy on PushCube-v1; results in runs/quickstart"
	@echo "make bench           speed against plain versions of the same; figures in runs/bench"
	@echo "make test            run the tests"
	@echo "make test-lerobot    run the tests that need LeRobot, in .venv-lerobot"
	@echo "make test-zoo        run the tests that need rl-zoo3, in .venv-zoo"
	@echo "make test-metaworld  run the tests that need MetaWorld, in .venv-metaworld"
	@echo "make identity        the fast simulator against ManiSkill's own, bit for bit, on every task that builds"
	@echo "make faults          break everything that can break, and print what comes of it"
	@echo "make soak [MINUTES=30] kill workers at random during stage 2"
	@echo "make check           lint, formatting, types, the order of the rooms"
	@echo "make docs            build the documentation into docs/_build/html; a warning is an error"
	@echo "make docs-links      look whether its links to other sites work; needs the net"
	@echo "make notebook        run docs/tutorial.ipynb and keep its output"
	@echo "make format          format the code and fix what ruff can fix"
	@echo "make setup           create .venv and install everything (the targets above do it themselves)"
	@echo "make clean           remove caches and build outputs"
	@echo "PYTHON=python3.11 chooses the interpreter of a new .venv."

setup: $(STAMP)

demo: setup
	$(PY) examples/run_recipe.py PushCube-v1 --seed $(SEED) --demo_path examples/demos/PushCube-v1.h5 --output runs/quickstart

bench: setup
	$(PY) -m pip install -q -c constraints.txt -e ".[envpool]"
	$(PY) examples/benchmark/run.py

test: setup
	$(PY) -m pytest -q -n logical --dist loadfile --no-loadscope-reorder

test-lerobot: $(STAMP_LEROBOT)
	OMP_NUM_THREADS=1 $(PY_LEROBOT) -m pytest -q tests/lerobot

# Makes the environment $(1) over .venv, whose packages it sees.
define venv_over
$(PY) -m venv $(1)
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(echo $(1)/lib/python*/site-packages)/below.pth"
endef

# An environment over .venv, with rl-zoo3 and what that needs in other versions.
test-zoo: setup
	$(call venv_over,.venv-zoo)
	.venv-zoo/bin/python -m pip install -q "rl_zoo3>=2.9"
	PYTHONPATH=. .venv-zoo/bin/python -m pytest -q tests/test_zoo.py

# An environment over .venv, with MetaWorld and EnvPool.
test-metaworld: setup
	$(call venv_over,.venv-metaworld)
	.venv-metaworld/bin/python -m pip install -q -c constraints.txt "metaworld>=3.1" "envpool>=1.2.5"
	PYTHONPATH=. .venv-metaworld/bin/python -m pytest -q tests/test_meta_world.py

identity: setup
	$(PY) -m pytest -q -rs -n logical -m exhaustive tests/test_fast.py tests/test_stack.py

faults: setup
	$(PY) -m tests.faults

soak: setup
	$(PY) examples/soak.py --minutes $(MINUTES)

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.docs-tools: setup
	$(PY) -m pip install -q -c constraints.txt -e ".[docs]"

docs: .docs-tools
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

docs-links: .docs-tools
	$(PY) -m sphinx -b linkcheck docs docs/_build/links

notebook: .docs-tools
	$(PY) -m jupyter execute --inplace docs/tutorial.ipynb

clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find sb3_dsrl examples tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp holds this folder's path: a .venv that was copied here, or whose Python is gone, is set up again.
ifneq ($(shell $(PY) -V >/dev/null 2>&1 && cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt .ci/setup.sh .ci/venv.sh
	.ci/setup.sh
	@echo "$(CURDIR)" > $@

ifneq ($(shell $(PY_LEROBOT) -V >/dev/null 2>&1 && cat $(STAMP_LEROBOT) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP_LEROBOT)
endif
$(STAMP_LEROBOT): pyproject.toml constraints-lerobot.txt .ci/setup-lerobot.sh .ci/venv.sh
	.ci/setup-lerobot.sh
	@echo "$(CURDIR)" > $@
