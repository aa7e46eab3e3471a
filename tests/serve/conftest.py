"""A server for the modules of this folder; some make their own with other options."""

from collections.abc import Iterator

import openai
import pytest
from served import Served, serve, tiny_llm


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(tiny_llm()) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client
