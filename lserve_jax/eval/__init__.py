"""What sparsity does to quality (docs/quality.md).

    study = Study(model="mine", tasks=("needle",), compare=("dense", "lserve"), lengths=(2048,))
    result = run_study(study, model=(config, params, tokenizer))
    pandas.DataFrame(result["answers"])
    figures(result)["passkey"].savefig("passkey.png")

The command line: ``python -m lserve_jax.eval``.
"""

from lserve_jax.lazy import lazy_names

_MODULES = {
    "SharedOptions": "lserve_jax.eval.model",
    "Study": "lserve_jax.eval.study",
    "figures": "lserve_jax.eval.report",
    "markdown": "lserve_jax.eval.report",
    "run_study": "lserve_jax.eval.study",
}

__getattr__ = lazy_names(__name__, _MODULES)
