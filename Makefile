# Every target works on a bare machine: it first makes .venv, once.
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo network-demo test test-fast browser docs docs-test wheel-test lm-eval-test ray-test fuzz check benchmarks claim clean

# A finished demonstration gives way to the next one; anything else of that name is left alone.
demo: $(READY)
	@if test -z "$(OUT)" && test -f mpu-demo/result.json; then rm -rf mpu-demo; fi
	$(BIN)/mpunlearn demo --out $(or $(OUT),mpu-demo) --seed $(or $(SEED),0)

# The same between two processes that speak over a network.
network-demo: $(READY)
	@if test -z "$(OUT)" && test -d mpu-network-demo/server/final; then rm -rf mpu-network-demo; fi
	$(BIN)/mpunlearn network-demo --out $(or $(OUT),mpu-network-demo) --seed $(or $(SEED),0)

# Three at a time, also on two cores: the tests of the network wait for other programs most of the time.
test: $(READY) browser
	$(BIN)/pytest -n 3 --dist worksteal

test-fast: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# The tests of the report need a Chromium; without one they are skipped.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		if command -v $$name > /dev/null; then exit 0; fi; \
	done; \
	if test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null && exit 0; \
	fi; \
	echo "no Chromium: the tests of the report's pages are skipped; install the package chromium to run them"

# The site, in site/. Needs no network; a warning is an error.
docs: $(READY)
	$(BIN)/zensical build --clean --strict

# Every command block of the documentation that is marked as runnable.
docs-test: $(READY)
	$(BIN)/pytest tests/test_docs.py -m "docs or not docs"

# What a package index would deliver: the wheel, in a new environment and an empty directory. KEEP=1 keeps both.
wheel-test: $(READY)
	rm -rf dist/test && mkdir -p dist/test/empty
	$(BIN)/python -m hatchling build -t wheel -d dist/test
	$(BIN)/python -m venv dist/test/venv
	dist/test/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	dist/test/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		"mpunlearn[all] @ file://$$(ls $(CURDIR)/dist/test/*.whl)"
	cd dist/test/empty && ../venv/bin/mpunlearn demo --quick && ../venv/bin/mpunlearn network-demo --quiet
	test -n "$(KEEP)" || rm -rf dist/test

# The tests with the real lm-eval, in an environment of its own, since it brings many packages. KEEP=1 keeps it.
lm-eval-test:
	test -x dist/lm-eval/bin/python || python3 -m venv dist/lm-eval
	dist/lm-eval/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	dist/lm-eval/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[client,data,lm-eval]" pytest hypothesis
	dist/lm-eval/bin/python -m pytest -m lm_eval tests/evaluation/test_general.py
	test -n "$(KEEP)" || rm -rf dist/lm-eval

# The passes on a Ray cluster on this machine, in an environment of its own.
ray-test:
	test -x dist/ray/bin/python || python3 -m venv dist/ray
	dist/ray/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	dist/ray/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray]"
	dist/ray/bin/pytest tests/server/test_ray.py

# Ten minutes for each target; SECONDS=60 for less.
fuzz: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	$(BIN)/python -m tests.fuzz.fuzz --seconds $(or $(SECONDS),600)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

benchmarks: $(READY)
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/passes.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/network.py
	$(if $(TOFU),$(BIN)/python benchmarks/tofu_small.py --tofu $(TOFU),@echo "give TOFU=DIRECTORY, the TOFU files, to run tofu_small")

# Hours on two cores; interrupted, it goes on where it stopped.
claim: $(READY)
	$(BIN)/python benchmarks/claim.py --suite claim
	$(BIN)/python benchmarks/claim.py --suite causes --seeds 3 --objectives npo,simnpo,grad-diff
	$(BIN)/python benchmarks/claim.py --suite orders --seeds 2 --objectives npo,simnpo

clean:
	rm -rf .venv mpu-demo mpu-network-demo dist site

# torch comes first and pinned, so that no later package pulls another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
