"""Prefixes on the device: computed, loaded from a file, saved to one, and released."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.prefix import Prefix, read_prefix
from lserve_jax.engine.request import PromptIds
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.model.quantise import code_types


class PrefixStore:
    """Makes prefixes on the pages that ``scheduler`` gives them, with ``runner``.

    ``finish_prompt`` runs what is left of the prompt in prefill. It is called before a prefix is
    written, since there is one prefill window. ``recover`` is called after an error in between.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        max_model_len: int,
        finish_prompt: Callable[[], None],
        recover: Callable[[], None],
    ):
        self.runner, self.scheduler = runner, scheduler
        self.max_model_len, self.finish_prompt, self.recover = max_model_len, finish_prompt, recover

    @property
    def has_room(self) -> bool:
        """Whether the model's prompts can share keys, and one more prefix can be held."""
        return self.scheduler.prefix_cache.has_room and not self._keys_depend_on_length

    @property
    def _keys_depend_on_length(self) -> bool:
        return self.runner.config.rope.rope_type == "dynamic"

    def add(self, token_ids: Sequence[int] | np.ndarray) -> Prefix:
        """See ``Engine.add_prefix``."""
        self.runner.check_params()
        ids = self._check(token_ids)
        held = self._pin_again(ids)
        if held is not None:
            return held
        prefix = self._insert(ids)
        with self._released_on_error(prefix):
            self._compute(prefix)
        return prefix

    def load(self, path: str | os.PathLike[str]) -> Prefix:
        """See ``Engine.load_prefix``."""
        ids, arrays = read_prefix(path, self.prefix_identity())
        ids = self._check(ids)
        held = self._pin_again(ids)
        if held is not None:
            return held
        prefix = self._insert(ids)
        with self._released_on_error(prefix):
            self._write(prefix, arrays, path)
        return prefix

    @contextmanager
    def _released_on_error(self, prefix: Prefix) -> Iterator[None]:
        try:
            yield
        except BaseException:  # an error on the device, or Ctrl-C: its pages hold nothing of use
            prefix.release()
            self.recover()
            raise

    def release_prefix(self, prefix: Prefix) -> None:
        """See ``Prefix.release``."""
        if prefix.is_released:
            raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released already")
        self.scheduler.prefix_cache.unpin(prefix)

    def prefix_arrays(self, prefix: Prefix) -> dict[str, jax.Array]:
        """What ``Prefix.save`` writes, by name."""
        if prefix.is_released:
            raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released")
        if not prefix.pages:
            return {}
        kept = self.runner.read_pages(*self._pages_of(prefix))
        windows = self.scheduler.prefix_cache.windows[prefix.index]
        leaves, _ = jax.tree.flatten_with_path((kept, windows))
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def prefix_identity(self) -> dict[str, str]:
        """What a saved prefix must agree with, by name."""
        spec = self.runner.spec
        logical = None if spec.sparsity is None else spec.sparsity.logical_page_size
        sizes = [
            f"{name} {window.sink} + {window.local}"
            for name, window in (("decode", spec.decode_window), ("prefill", spec.prefill_window))
        ]
        return {
            "page size": f"{spec.page_size}, logical {logical}",
            "kv_dtype": f"{spec.kv_dtype}, {jnp.dtype(self.runner.dtype).name}",
            "number of retrieval heads": str(spec.heads.num_retrieval),
            # Those have statistics; whether others read everything, their pages do not tell.
            "number of ranked heads": str(spec.heads.num_ranked),
            "sink and local sizes": ", ".join(sizes),
            "type of codes in the weights": code_types(self.runner.params),
            "model": self.runner.fingerprint(),
        }

    def _check(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """As int32; raises ``ValueError`` for what cannot be a prefix."""
        ids = PromptIds.check(token_ids, self.runner.config.vocab_size, what="prefix").ids
        if len(ids) > self.max_model_len:
            raise ValueError(
                f"the prefix has {len(ids)} tokens, more than max_model_len={self.max_model_len}"
            )
        return ids

    def _pin_again(self, ids: np.ndarray) -> Prefix | None:
        """Pins the prefix of these tokens once more; None if there is none."""
        prefix = self.scheduler.prefix_cache.find(ids)
        if prefix is not None:
            prefix.pins += 1
        return prefix

    def _insert(self, ids: np.ndarray) -> Prefix:
        if self._keys_depend_on_length:
            raise NotImplementedError(
                "rope_type='dynamic' rotates a key by the length of its prompt: prompts of "
                "different lengths cannot share keys"
            )
        page_size = self.runner.spec.page_size
        prefix = Prefix(token_ids=ids, page_size=page_size, owner=self)
        if len(ids) >= page_size:
            self.finish_prompt()
            self.scheduler.add_prefix(prefix, len(ids) // page_size)
        return prefix

    def _compute(self, prefix: Prefix) -> None:
        """Computes the prefix's pages, and keeps what its requests need of the window."""
        if not prefix.pages:
            return
        runner, shared = self.runner, prefix.num_shared_tokens
        table = np.zeros((runner.spec.pages_per_sequence,), np.int32)
        table[: len(prefix.pages)] = prefix.pages
        for start in range(0, shared, runner.chunk_size):
            tokens = prefix.token_ids[start:shared][: runner.chunk_size]
            chunk = Chunk(tokens=tokens, page_table=table, start=start, prompt_length=shared)
            runner.prefill(chunk)
        sink_page = runner.spec.prefix_sink(prefix.index)
        windows = runner.save_window(sink_page, len(prefix.pages))
        self.scheduler.prefix_cache.windows[prefix.index] = windows

    def _write(
        self, prefix: Prefix, arrays: dict[str, jax.Array], path: str | os.PathLike[str]
    ) -> None:
        """Puts a saved prefix's arrays on its pages.

        Raises ``ValueError`` where one is missing or another one: the digest covers no names.
        """
        if not prefix.pages:
            if arrays:
                raise ValueError(
                    f"prefix file {os.fspath(path)!r} is broken: its {len(prefix.token_ids)} "
                    f"token_ids fill no page, but it holds {min(arrays)}"
                )
            return
        pages = self._pages_of(prefix)
        paths, tree = jax.tree.flatten_with_path(self.runner.prefix_shapes(*pages))
        leaves = []
        for key, wanted in paths:
            name = jax.tree_util.keystr(key)
            leaf = arrays.get(name)
            if leaf is None or (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                found = "nothing" if leaf is None else f"{leaf.dtype} {leaf.shape}"
                raise ValueError(
                    f"prefix file {os.fspath(path)!r} is broken: {name} must be {wanted.dtype} "
                    f"{wanted.shape}, found {found}"
                )
            leaves.append(leaf)
        kept, windows = jax.tree.unflatten(tree, leaves)
        self.runner.write_pages(kept, *pages)
        self.scheduler.prefix_cache.windows[prefix.index] = windows

    def _pages_of(self, prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
        """Its retrieval pages, and the pages of its sinks in the streaming pool; int32."""
        spec = self.runner.spec
        sinks = spec.prefix_sink(prefix.index) + np.arange(spec.decode_window.sink_pages)
        return np.asarray(prefix.pages, np.int32), sinks.astype(np.int32)
