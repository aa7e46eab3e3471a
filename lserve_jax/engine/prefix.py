"""Prefixes that somebody asked to keep: pinned in the prefix tree until they are released.

Requests that begin with a prefix's tokens share its whole pages by reference, as they share those
of any prompt that the engine remembers (``prefix_tree.py``). A pinned one is never evicted, and
neither is the window that streaming heads go on from at its end.

Requests are matched by token ids, never by text: where a text is cut, its tokens can change.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from lserve_jax.checks import check_path
from lserve_jax.engine.prefix_tree import Pin

FORMAT = "lserve_jax prefix 3"


class PrefixOwner(Protocol):
    """What a prefix asks of the store that made it."""

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
    owner: PrefixOwner
    pin: Pin | None = None  # None: it fills no page, or is released
    pins: int = 1  # how often it was asked for and not released

    def __repr__(self) -> str:
        """Without the token ids, of which there can be many."""
        return (
            f"Prefix({len(self.token_ids)} tokens, {self.num_shared_tokens} of them on "
            f"{len(self.pages)} pages, pins={self.pins}, ref_count={self.ref_count})"
        )

    @property
    def is_released(self) -> bool:
        return self.pins == 0

    @property
    def pages(self) -> list[int]:
        """Retrieval pages, in order."""
        return [] if self.pin is None else [node.page for node in self.pin.node.path()]

    @property
    def ref_count(self) -> int:
        """Requests in slots that share all of its pages."""
        return 0 if self.pin is None else self.pin.node.locks - self.pin.node.pins

    @property
    def num_shared_tokens(self) -> int:
        """Tokens on its pages."""
        return 0 if self.pin is None else self.pin.node.depth * self.page_size

    def release(self) -> None:
        """Gives the pages back, once for each time that the prefix was asked for.

        Raises ``ValueError`` if that has happened already.
        """
        self.owner.release_prefix(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokens, keys, values and statistics to a safetensors file.

        For a model of 8B in bf16 that is 128 KiB a token. The file is whole or not there: it is
        written under another name beside ``path`` first.

        Raises ``ValueError`` once released and for a ``path`` that is no regular file (a device
        would be replaced by one), and ``OSError`` if the file cannot be written.
        """
        check_path("path", path)
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"prefix file {os.fspath(path)!r} must be new or a regular file")
        token_ids, arrays = json.dumps(self.token_ids.tolist()), self.owner.prefix_arrays(self)
        metadata = {
            "format": FORMAT,
            "token_ids": token_ids,
            "digest": _digest(token_ids, arrays),
            **self.owner.prefix_identity(),
        }
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            save_file(arrays, unfinished, metadata)
            unfinished.replace(path)
        except SafetensorError as error:  # its own of a full disk too
            raise OSError(f"prefix file {str(path)!r} cannot be written: {error}") from None
        finally:
            unfinished.unlink(missing_ok=True)


def _digest(token_ids: str, arrays: dict[str, jax.Array]) -> str:
    digest = hashlib.sha256(token_ids.encode())
    for name in sorted(arrays):
        digest.update(np.asarray(arrays[name]).tobytes())
    return digest.hexdigest()


def read_prefix(
    path: str | os.PathLike[str], identity: dict[str, str]
) -> tuple[Any, dict[str, jax.Array]]:
    """What a file that ``Prefix.save`` wrote holds as token ids, not checked yet, and its arrays.

    ``identity`` is what the file must say of model and cache. Raises ``ValueError`` for a file that
    is missing, broken, or of another model or cache layout; ``TypeError`` for what is no path.
    """
    check_path("path", path)
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prefix file {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") in ("lserve_jax prefix 1", "lserve_jax prefix 2"):
                raise ValueError(
                    f"prefix file {str(path)!r} is of an older version, which kept other parts of "
                    "the cache: compute the prefix again"
                )
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
    except SafetensorError as error:
        raise ValueError(f"prefix file {str(path)!r} is broken: {error}") from None
    token_ids = metadata.get("token_ids", "")
    if metadata.get("digest") != _digest(token_ids, arrays):
        raise ValueError(f"prefix file {str(path)!r} is broken: its digest does not match")
    try:
        return json.loads(token_ids), arrays
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"prefix file {str(path)!r} is broken: its token_ids are no JSON: {error}"
        ) from None


def check_begins(prefix: Prefix, prompts: Sequence[np.ndarray]) -> None:
    """Raises ``ValueError`` unless all prompts (token ids) begin with the prefix's whole pages."""
    if prefix.is_released:
        raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released")
    for i, prompt in enumerate(prompts):
        # Only whole pages are shared: what follows them may be cut into other tokens in a prompt.
        shared = prefix.token_ids[: prefix.num_shared_tokens]
        beginning = prompt[: len(shared)]
        same = beginning == shared[: len(beginning)]
        if len(beginning) < len(shared) or not same.all():
            at = len(beginning) if same.all() else int(same.argmin())
            raise ValueError(
                f"prompt {i} does not begin with the prefix of {len(prefix.token_ids)} tokens: "
                f"they differ at token {at}"
            )
