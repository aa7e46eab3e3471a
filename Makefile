# make generate PROMPT="…"   prints what the model says      [MODEL=… ARGS="--max-tokens 64 …"]
# make serve                 serves a model over HTTP       [MODEL=… ARGS="--port 8001 …"]
# make test                  runs the tests                  [TESTS=tests/engine ARGS="-k …"]
# make lint                  ruff and pyrefly
# make docs                  makes the API reference     in .cache/reference
# make clean                 removes the environment and caches that the above made
#
# Each makes what it needs first and skips what is done already: a virtual environment with this
# package in it. EXTRAS=cuda13 adds JAX's wheels for NVIDIA GPUs; PYTHON=… names the interpreter.
# Modules are compiled to bytecode when they are first imported: most of what is installed never is.

VENV    := .venv
PYTHON  :=
EXTRAS  :=
PINS    :=
MODEL   :=
PROMPT  :=
ARGS    :=
TESTS   :=
WORKERS := 2

comma        := ,
serve_extras := serve$(if $(EXTRAS),$(comma)$(EXTRAS))
test_extras  := test$(if $(EXTRAS),$(comma)$(EXTRAS))
python       := $(VENV)/bin/python
run_ready    := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))
serve_ready  := $(VENV)/.ready-$(subst $(comma),-,$(serve_extras))
test_ready   := $(VENV)/.ready-$(subst $(comma),-,$(test_extras))
docs_ready   := $(VENV)/.ready-docs

# Otherwise every process that a test starts compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: generate serve test lint docs clean

# The prompt travels as an environment variable, as given: quotes and dollars in it are text.
generate: export prompt_text := $(value PROMPT)
generate: $(run_ready)
	@$(python) -m lserve_jax.generate $(if $(MODEL),--model "$(MODEL)") \
	    $(if $(value PROMPT),--prompt="$$prompt_text") $(ARGS)

serve: $(serve_ready)
	@$(python) -m lserve_jax.serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: $(test_ready)
	@$(python) -m pytest -n $(WORKERS) --dist worksteal $(ARGS) $(TESTS)

lint: $(test_ready)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(VENV)/bin/pyrefly check --python-interpreter-path $(python)

docs: $(docs_ready)
	@$(python) -m mkdocs --quiet build --strict

clean:
	rm -rf .venv .venv-* $(VENV) .cache

$(VENV)/.made:
	@python=$$(.ci/find-python $(PYTHON)) && echo "Making $(VENV) with $$python" >&2 \
	    && "$$python" -m venv --clear $(VENV)
	@touch $@

$(run_ready): extras := $(EXTRAS)
$(serve_ready): extras := $(serve_extras)
$(test_ready): extras := $(test_extras)
$(docs_ready): extras := docs
$(run_ready) $(serve_ready) $(test_ready) $(docs_ready): pyproject.toml $(VENV)/.made
	@echo "Installing lserve-jax$(if $(extras),[$(extras)]) into $(VENV)" >&2
	@$(python) -m pip install --quiet --no-compile --editable ".$(if $(extras),[$(extras)])" $(PINS)
	@touch $@
