# make demo and make test set up .venv by themselves; PYTHON=/path/to/python3 chooses another interpreter.
VENV = .venv/bin
SETUP = @tools/python.sh tools/environment.py

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-9s %s\n' "$$name" "$$what"; done

demo: ## from nothing to a GPT trained on real text, in minutes; CORPUS=path takes your own files
	$(SETUP) demo
	@$(VENV)/python -m fastgpt.demo $(if $(CORPUS),--corpus '$(CORPUS)')

kernels: ## the CUDA kernels where nvcc is, and the same kernels for the emulator, which shows them without a GPU
	$(SETUP) test
	@$(VENV)/python -m fastgpt.native.build
	@$(VENV)/python -m tests.ptx.build || true # for `make gpu`
	@$(VENV)/python benchmarks/kernel_minute.py --unless-gpu

wheel: ## one wheel with the CUDA kernels in dist/, for every Python and every torch that the kernels support
	$(SETUP) test
	@FASTGPT_CUDA=1 $(VENV)/python -m pip wheel -q --no-build-isolation --no-deps -w dist . && ls dist

test: ## every test that runs in minutes
	$(SETUP) test
	@$(VENV)/python -m fastgpt.native.build || true # where it fails, the tests that need it say why
	@$(VENV)/python -m pytest -n auto --dist loadfile -m 'not slow'

test-all: ## the long tests too
	$(SETUP) test
	@$(VENV)/python -m fastgpt.native.build || true
	@$(VENV)/python -m pytest

lint: ## ruff: errors and format
	$(SETUP) test
	@$(VENV)/ruff check . && $(VENV)/ruff format --check .

bench: ## speed of this machine: what training reaches beside a plain PyTorch loop, and the data path
	$(SETUP) test
	@for file in benchmarks/train.py benchmarks/quality.py benchmarks/bench_*.py; do echo "== $$file" && $(VENV)/python $$file || exit 1; done

gpu: ## on a GPU, with what `make kernels` built: every instruction, the tests, the benchmarks, in 8 minutes
	@PYTHON="$${PYTHON:-$$([ ! -x $(VENV)/python ] || echo $(VENV)/python)}" tools/python.sh tools/gpu.py $(if $(OUT),--out '$(OUT)')

.DEFAULT_GOAL = help
.PHONY: help demo kernels wheel test test-all lint bench gpu
