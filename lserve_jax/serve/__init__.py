"""A service with OpenAI's API: ``python -m lserve_jax.serve`` (extra ``serve``)."""
