"""Prefixes that are kept: computed or loaded from a file, saved to one, and released."""

import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lserve_jax.attention.attend import chosen_by
from lserve_jax.engine.prefix import Prefix, read_prefix
from lserve_jax.engine.prefix_cache import Match, PromptPages
from lserve_jax.engine.request import PromptIds
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.scheduler import Scheduler
from lserve_jax.model.quantise import code_types


class PrefixStore:
    """Makes prefixes on the pages that ``scheduler`` gives them, with ``runner``.

    ``finish_prompt`` runs what is left of the prompt in prefill. It is called before a prefix is
    written, since its window must be there. ``recover`` is called after an error in between.
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
        self.held: list[Prefix] = []  # pinned, on at least one page

    def add(self, token_ids: Sequence[int] | np.ndarray) -> Prefix:
        """See ``Engine.add_prefix``."""
        self.runner.check_params()
        ids = self._check(token_ids)
        held = self._pin_again(ids)
        if held is not None:
            return held
        return self._keep(ids, self._compute, goes_on=True)

    def load(self, path: str | os.PathLike[str]) -> Prefix:
        """See ``Engine.load_prefix``."""
        ids, arrays = read_prefix(path, self.prefix_identity())
        ids = self._check(ids)
        held = self._pin_again(ids)
        if held is not None:
            return held
        # On pages of its own: nobody's keys change while they are read.
        return self._keep(ids, lambda prompt: self._write(prompt, arrays, path), goes_on=False)

    def release_prefix(self, prefix: Prefix) -> None:
        """See ``Prefix.release``."""
        if prefix.is_released:
            raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released already")
        prefix.pins -= 1
        if prefix.pins == 0 and prefix.pin is not None:
            self.scheduler.prefix_cache.unpin(prefix.pin)
            prefix.pin = None
            self.held.remove(prefix)

    def release_all(self) -> None:
        """Releases every prefix, for all who hold it."""
        for prefix in list(self.held):
            prefix.pins = 1
            self.release_prefix(prefix)

    def forget(self) -> None:
        """Every prefix is released: the pages hold nothing any more."""
        for prefix in self.held:
            prefix.pins, prefix.pin = 0, None
        self.held = []

    def prefix_arrays(self, prefix: Prefix) -> dict[str, jax.Array]:
        """What ``Prefix.save`` writes, by name."""
        if prefix.is_released:
            raise ValueError(f"the prefix of {len(prefix.token_ids)} tokens is released")
        if prefix.pin is None:
            return {}
        path = prefix.pin.node.path()
        windows = [path[n].window for n in self._saved_windows(len(path))]
        assert min(windows, default=0) >= 0  # -1 would name the pool's last
        kept = self.runner.read_pages(*_int32(prefix.pages, windows))
        leaves, _ = jax.tree.flatten_with_path(kept)
        return {jax.tree_util.keystr(path): _as_saved(leaf) for path, leaf in leaves}

    def prefix_identity(self) -> dict[str, str]:
        """What a saved prefix must agree with, by name."""
        spec = self.runner.spec
        logical = None if spec.sparsity is None else spec.sparsity.logical_page_size
        sizes = [
            f"{name} {window.sink} + {window.local}"
            for name, window in (("decode", spec.decode_window), ("prefill", spec.prefill_window))
        ]
        if spec.sparsity is not None and spec.sparsity.prefill == "block_sparse":
            chosen = ", ".join(f"{name} {value}" for name, value in chosen_by(spec).items())
            sizes.append(
                f"block-sparse from {spec.sparsity.prefill_min_tokens} tokens on in chunks of "
                f"{self.runner.chunk_size}, {chosen}, dense heads whole"
            )
        codes = code_types(self.runner.params)
        if self.runner.prefill_dtype is not None:
            codes += f", prefill_dtype {self.runner.prefill_dtype}"
        cache = self.scheduler.prefix_cache
        shared = str(cache.tree.grain)
        if cache.deterministic:  # where a page is a chunk, the number alone does not tell
            shared += f", deterministic in chunks of {self.runner.chunk_size}"
        return {
            "page size": f"{spec.page_size}, logical {logical}",
            "kv_dtype": f"{spec.kv_dtype}, {jnp.dtype(self.runner.dtype).name}",
            # With whole chunks only a prefix has fewer pages.
            "number of pages that are shared at once": shared,
            "number of retrieval heads": str(spec.heads.num_retrieval),
            # Those have statistics; the others read everything, in block-sparse prefill too.
            "number of ranked heads": str(spec.heads.num_ranked),
            "sink and local sizes": ", ".join(sizes),
            "type of codes in the weights": codes,
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
        for prefix in self.held:
            if np.array_equal(prefix.token_ids, ids):
                prefix.pins += 1
                return prefix
        return None

    def _keep(
        self, ids: np.ndarray, fill: Callable[[PromptPages], None], *, goes_on: bool
    ) -> Prefix:
        """A prefix that ``fill`` makes, all of it or with ``goes_on`` what the tree lacks."""
        if self.runner.config.rope.rope_type == "dynamic":
            raise NotImplementedError(
                "rope_type='dynamic' rotates a key by the length of its prompt: prompts of "
                "different lengths cannot share keys"
            )
        cache, P = self.scheduler.prefix_cache, self.runner.spec.page_size
        prefix = Prefix(token_ids=ids, page_size=P, owner=self)
        # Prompts that begin with it are at least as long.
        block_sparse = self.runner.spec.is_block_sparse(len(ids))
        num_pages = cache.whole_pages(len(ids), block_sparse)
        prompt = PromptPages(prompt=ids[: num_pages * P], block_sparse=block_sparse, goes_on=True)
        if num_pages == 0:
            fill(prompt)
            return prefix

        def match() -> Match:
            if not goes_on:
                return Match(None, [])
            # Of a prompt of one token more, since none of it needs to run.
            longer = np.append(prompt.prompt, np.int32(0))
            return cache.match(PromptPages(prompt=longer, block_sparse=block_sparse))

        self.scheduler.check_prefix(prompt, match().node)
        self.finish_prompt()
        found = match()
        cache.begin(prompt, found)
        try:
            cache.grow(prompt, num_pages)
            cache.restore(prompt, found)
            fill(prompt)
            assert prompt.node is not None  # at the least one page is in the tree
            prefix.pin = cache.tree.pin(prompt.node)
            self.held.append(prefix)
        except BaseException:  # an error on the device, or Ctrl-C: its pages hold nothing of use
            cache.release(prompt)
            self.recover()
            raise
        cache.release(prompt)
        return prefix

    def _compute(self, prompt: PromptPages) -> None:
        """Computes what the tree does not have of a prefix."""
        cache = self.scheduler.prefix_cache
        while prompt.prefilled < len(prompt.prompt):
            chunk = self.scheduler.chunk_of(prompt, self.runner.chunk_size)
            self.runner.prefill([chunk])
            cache.computed(prompt, len(chunk.tokens), remember=True)

    def _write(
        self, prompt: PromptPages, arrays: dict[str, jax.Array], path: str | os.PathLike[str]
    ) -> None:
        """Puts a saved prefix's arrays on its pages.

        Raises ``ValueError`` where one is missing or another one: the digest covers no names.
        """
        if not prompt.pages:
            if arrays:
                raise ValueError(
                    f"prefix file {os.fspath(path)!r} is broken: its tokens fill no page, but it "
                    f"holds {min(arrays)}"
                )
            return
        cache, end = self.scheduler.prefix_cache, len(prompt.prompt)
        saved = self._saved_windows(len(prompt.pages))
        cache.add_windows(prompt, saved)  # of no other page: what the file lacks is not there
        pages = tuple(_int32(prompt.pages, [prompt.window[number] for number in saved]))
        paths, tree = jax.tree.flatten_with_path(self.runner.page_shapes(*pages))
        leaves = []
        for key, shape in paths:
            name = jax.tree_util.keystr(key)
            leaf, wanted = arrays.get(name), jax.eval_shape(_as_saved, shape)
            if leaf is None or (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                found = "nothing" if leaf is None else f"{leaf.dtype} {leaf.shape}"
                raise ValueError(
                    f"prefix file {os.fspath(path)!r} is broken: {name} must be {wanted.dtype} "
                    f"{wanted.shape}, found {found}"
                )
            leaves.append(leaf.view(shape.dtype))
        self.runner.write_pages(jax.tree.unflatten(tree, leaves), *pages)
        cache.computed(prompt, end - prompt.prefilled, remember=True)

    def _saved_windows(self, num_pages: int) -> list[int]:
        """Of so many pages of a prompt those whose window pages are saved, in order."""
        window = self.runner.spec.prefill_window
        if not self.scheduler.prefix_cache.streams:
            return []
        first = max(min(window.sink_pages, num_pages), num_pages - window.local_pages + 1)
        return [*range(min(window.sink_pages, num_pages)), *range(first, num_pages)]


def _as_saved(x: jax.Array) -> jax.Array:
    """float8 as its bytes: safetensors writes it, and reads it in no way that gives arrays."""
    return x.view(jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x


def _int32(*pages: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(ids, np.int32) for ids in pages)
