# make setup · demo · test · test-fast · lint · docs · proto · claims · bench · bench-serving · bench-queue · fuzz-sampler · fuzz-converter · prove-NAME · chaos · audit.
# Each sets up what is missing, once.
# Where pip would fetch a CUDA build of torch that you do not need:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
SHELL := /bin/sh
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON := $(or $(PYTHON),$(shell for p in python3.11 python3.12 python3.13 python3; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done))
BIN := .venv/bin
STAMP := .venv/.setup-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# Every package of ours, and the programs of a checkout, strictly.
TYPED := libs/distill_core/distill_core libs/distill_service/distill_service libs/distillery_cli/distillery_cli \
         services/trainer services/sampler services/converter benchmarks tools
OURS := libs services tests deploy benchmarks tools

.PHONY: setup demo test test-fast lint docs proto claims bench bench-serving bench-queue fuzz-sampler fuzz-converter chaos audit
setup: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or give PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[all,docs,dev]' && rm -f .venv/.setup-* && touch $@

demo: setup
	$(BIN)/distillery demo

test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# The inner loop, at most three minutes on two idle cores: the units without those marked slow, and the tree's own rules.
test-fast: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow" tests/unit tests/test_architecture.py $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check $(OURS) && $(BIN)/ruff format --check $(OURS)
	$(BIN)/mypy --strict $(TYPED)

# All pages and docstrings as a site in out/docs; the reference is written anew first. A broken link ends it.
docs: setup
	$(BIN)/distillery reference --write docs/reference > /dev/null
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

proto: setup
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. distillery/v1/*.proto

# One claim each: prove-triton, prove-seeds, prove-swaps …, as files in tests/proofs.
prove-%: setup
	$(BIN)/python -m pytest tests/proofs/test_$*.py $(PYTEST_ARGS)

prove-memory: setup
	$(BIN)/python -m tests.proofs.memory

claims: setup
	$(BIN)/python -m tools claims

chaos: setup
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

audit: setup
	$(BIN)/bandit -q -c pyproject.toml -r libs services deploy
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

bench: setup
	$(BIN)/python -m benchmarks overview --page docs/performance.md

bench-serving: setup
	$(BIN)/python -m benchmarks serving --page docs/serving_performance.md

# 20,000 broken calls against a live sampler, after a warm-up of 10,000; its table also as out/fuzz/sampler.json.
fuzz-sampler: setup
	$(BIN)/python -m tests.services.fuzz.run

# Damaged models: one sentence from the converter and the sampler each time. COUNT and SEED change how many and which.
fuzz-converter: setup
	$(BIN)/python -m tests.services.fuzz.converter --seed $(or $(SEED),0) --count $(or $(COUNT),2000)

bench-queue: setup
	$(BIN)/python -m benchmarks queue --page docs/queue_performance.md
