"""Shared prefixes: tokens whose keys and values are computed once and used by many requests.

A prefix's whole pages stay in the retrieval pool, where requests that begin with its tokens share
them by reference. Streaming heads need less of it: the sinks, which lie once in the streaming pool
and are shared too, and the prefill window at the prefix's end, from which a request goes on.

    prefix      | page 0 | page 1 | ...  | page n-1 | rest |
    pool          shared   shared          shared     every request computes it with its own tokens
    streaming     sinks, shared   ...  the last tokens, copied to each request's window and ring

Requests are matched by token ids, never by text: where a text is cut, its tokens can change.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from pallas_kernels.api import KVPages

FORMAT = "lserve_jax prefix 1"


class PrefixOwner(Protocol):
    """What a prefix asks of the engine that holds its pages."""

    def release_prefix(self, prefix: "Prefix") -> None: ...

    def prefix_arrays(self, prefix: "Prefix") -> dict[str, jax.Array]: ...

    def prefix_identity(self) -> dict[str, str]: ...


@dataclass(kw_only=True, eq=False)
class Prefix:
    """A shared prefix, held in an engine's cache until it is released.

    Made by ``LLM.prefix`` and ``LLM.load_prefix``. Its pages stay where they are (pinned) whether
    or not a request uses them; requests that run when it is released keep them until they end.
    """

    token_ids: np.ndarray  # [n] int32
    page_size: int
    owner: PrefixOwner = field(repr=False)
    # Of its whole pages; empty for a prefix that fills no page, which shares nothing.
    pages: list[int] = field(default_factory=list, repr=False)
    place: int = -1  # among the engine's prefixes; -1: it holds no pages
    windows: list[KVPages] = field(default_factory=list, repr=False)  # of each layer
    holders: int = 1  # who asked for it and has not released it
    users: int = 0  # requests in slots that share its pages

    @property
    def is_released(self) -> bool:
        return self.holders == 0

    @property
    def num_shared_tokens(self) -> int:
        """Tokens on its whole pages."""
        return len(self.pages) * self.page_size

    def shared_tokens_of(self, prompt: np.ndarray) -> int:
        """How many of a prompt's tokens need not be computed: whole pages, never all of them.

        0 if the prompt does not begin with the prefix's whole pages.
        """
        shared = self.num_shared_tokens
        if len(prompt) < shared or not np.array_equal(prompt[:shared], self.token_ids[:shared]):
            return 0
        return min(shared, (len(prompt) - 1) // self.page_size * self.page_size)

    def release(self) -> None:
        """Gives the pages back, once for each time that the prefix was asked for.

        Raises ``ValueError`` if that has happened already.
        """
        self.owner.release_prefix(self)

    def save(self, path: str | Path) -> None:
        """Writes tokens, keys, values and statistics to a safetensors file.

        For a model of 8B in bf16 that is 128 KiB a token. Raises ``ValueError`` once released.
        """
        metadata = {
            "format": FORMAT,
            "token_ids": json.dumps(self.token_ids.tolist()),
            **self.owner.prefix_identity(),
        }
        save_file(self.owner.prefix_arrays(self), path, metadata)


def read_prefix(
    path: str | Path, identity: dict[str, str]
) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """Token ids and arrays of a file that ``Prefix.save`` wrote.

    ``identity`` is what the file must say of model and cache. Raises ``ValueError`` for a file that
    is missing, broken, or of another model or cache layout.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prefix file {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{str(path)!r} is no prefix file: its format is {metadata.get('format')!r}, "
                    f"expected {FORMAT!r}"
                )
            for name, wanted in identity.items():
                if metadata.get(name) != wanted:
                    raise ValueError(
                        f"the prefix in {str(path)!r} was made with another {name}: "
                        f"{metadata.get(name)} there, {wanted} here"
                    )
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
            token_ids = np.asarray(json.loads(metadata["token_ids"]), np.int32)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"prefix file {str(path)!r} is broken: {error}") from None
    return token_ids, arrays


def common_prefix(prompts: Sequence[Sequence[int] | np.ndarray], page_size: int) -> np.ndarray:
    """The longest token prefix of all prompts that is a whole number of pages, int32.

    >>> common_prefix([[1, 2, 3, 4, 5], [1, 2, 3, 9]], page_size=2).tolist()
    [1, 2]
    """
    first = np.asarray(prompts[0], np.int32)
    shared = len(first)
    for prompt in prompts[1:]:
        other = np.asarray(prompt[:shared], np.int32)
        same = first[: len(other)] == other
        shared = len(other) if same.all() else int(same.argmin())
    return first[: shared // page_size * page_size]
