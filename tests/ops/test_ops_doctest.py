"""The example in the docstring of every public op runs and prints what it says."""

import doctest
from types import FunctionType

import pytest

from pallas_kernels import api

OPS = [name for name in api.__all__ if isinstance(getattr(api, name), FunctionType)]


@pytest.mark.parametrize("name", OPS)
def test_example(name: str) -> None:
    (test,) = doctest.DocTestFinder().find(getattr(api, name), name, api)
    assert test.examples, f"{name} has no example"
    output: list[str] = []
    result = doctest.DocTestRunner().run(test, out=output.append)
    assert result.failed == 0, "".join(output)
