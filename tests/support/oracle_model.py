"""A whole Llama with LServe's attention in float64 NumPy, one sequence, straight from the paper.

Nothing here is shared with the code under test and nothing here saves memory: every key and value
ever computed stays in a plain array in token order, heads stay in checkpoint order, and what a
query may see is an explicit set of positions. There are no pages in memory, tables, rings, chunks
or slots; a page is only a range of positions.

    model = Oracle(config, params, sparsity=sparsity, streaming=streaming)
    model.prefill(prompt)  # logits [T, V]
    model.decode(token)  # logits [V]; the reuse clock ticks
"""

import math

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lserve_jax.attention.config import SparsityConfig
from lserve_jax.model.config import ModelConfig

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


def log_softmax(logits: F64) -> F64:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def streaming_heads(gates: ArrayLike, fraction: float) -> list[list[bool]]:
    """Per layer and KV head: whether it is among the ``fraction`` of heads with lowest gates."""
    gates = np.asarray(gates)
    ranked = sorted((gate, where) for where, gate in np.ndenumerate(gates))
    lowest = {where for _, where in ranked[: round(fraction * gates.size)]}
    return [[(l, h) in lowest for h in range(gates.shape[1])] for l in range(gates.shape[0])]


class Oracle:
    """One sequence. ``streaming[layer][kv head]``, in checkpoint order; None: no head streams.

    ``sparsity`` None is dense attention. ``params`` is the tree that ``LLM`` takes.
    ``shares[layer][kv head]``: what a head that does not stream may list of the context, 1 being
    everything; None: all have the sparsity's token budget.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict,
        *,
        sparsity: SparsityConfig | None = None,
        streaming: list[list[bool]] | None = None,
        shares: list[list[float]] | None = None,
    ):
        assert config.rope.rope_type == "default"  # the other types have tests of their own
        L, Hk, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.config, self.sparsity = config, sparsity
        # A page, from here on, is what selection takes or leaves.
        self.selected_page_size = 0
        if sparsity is not None:
            self.selected_page_size = sparsity.selected_page_size or sparsity.logical_page_size
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.streaming = streaming or [[False] * Hk for _ in range(L)]
        self.shares = shares
        self.keys = [np.zeros((0, Hk, D)) for _ in range(L)]  # rotated, as they would be cached
        self.values = [np.zeros((0, Hk, D)) for _ in range(L)]
        self.length = 0
        self.steps = 0  # decode steps so far
        self.chosen: dict[tuple[int, int], list[int]] = {}  # (layer, head): pages chosen last
        self.tail = 0  # page of the newest history token at the last selection
        self.attended: dict[tuple[int, int], list[int]] = {}  # (layer, head): positions, last step
        # Least distance between the score of a page that was chosen and one that was not. Where
        # it is as small as float32's errors, the code may rightly choose otherwise.
        self.closest_call = np.inf

    def prefill(self, tokens: ArrayLike) -> F64:
        """The whole prompt; logits after each of its tokens."""
        return self._forward(np.asarray(tokens), self._prompt_mask)

    def decode(self, token: int) -> F64:
        """One more token; the logits after it."""
        logits = self._forward(np.array([token]), self._step_mask)[0]
        self.steps += 1
        return logits

    def _prompt_mask(self, layer: int, head: int, queries: F64) -> Mask:
        i, j = np.arange(self.length)[:, None], np.arange(self.length)
        if not self.streaming[layer][head]:
            return j <= i
        sink, local = self.sparsity.prefill_sink, self.sparsity.prefill_local
        return (j <= i) & ((j < sink) | (j >= i - (local - 1)))

    def _step_mask(self, layer: int, head: int, queries: F64) -> Mask:
        """The positions that one new token at the end may see, ``[1, length]``."""
        j, position = np.arange(self.length), self.length - 1
        if self.sparsity is None:
            seen = j <= position
        elif self.streaming[layer][head]:
            seen = (j < self.sparsity.decode_sink) | (j > position - self.sparsity.decode_local)
        else:
            if self.steps % self.sparsity.reuse_interval == 0:
                self.tail = (position - 1) // self.selected_page_size
                self.chosen[layer, head] = self._choose(layer, head, queries[0])
            page = j // self.selected_page_size
            seen = np.isin(page, self.chosen[layer, head]) | (page >= self.tail)
        self.attended[layer, head] = np.flatnonzero(seen).tolist()
        return seen[None]

    def _choose(self, layer: int, head: int, queries: F64) -> list[int]:
        """The best of the pages before the tail, as many as the budget leaves beside one page."""
        count = self._count(layer, head)
        if self.tail <= count:
            return list(range(self.tail))
        scores = [self._score(layer, head, page, queries) for page in range(self.tail)]
        forced = self.sparsity.forced_sink_pages
        ranked = sorted(range(forced, self.tail), key=lambda page: (-scores[page], page))
        last, next_best = ranked[count - forced - 1], ranked[count - forced]
        self.closest_call = min(self.closest_call, scores[last] - scores[next_best])
        return list(range(forced)) + ranked[: count - forced]

    def _count(self, layer: int, head: int) -> int:
        """Pages that a head may choose beside the one that its last token is in."""
        if self.shares is None:
            return self.sparsity.token_budget // self.selected_page_size - 1
        share = self.shares[layer][head]
        if share == 1.0:
            return self.tail
        # Of all pages that there are; never less than 128 tokens.
        pages = math.floor(share * (self.tail + 1) + 0.5)
        least = max(128 // self.selected_page_size, self.sparsity.forced_sink_pages + 2)
        return max(pages, least) - 1

    def _score(self, layer: int, head: int, page: int, queries: F64) -> float:
        U, logical = self.selected_page_size, self.sparsity.logical_page_size
        scores = []
        for first in range(page * U, (page + 1) * U, logical):
            keys = self.keys[layer][first : first + logical, head]
            high, low = keys.max(axis=0), keys.min(axis=0)
            for q in queries:
                upper = np.maximum(q * high, q * low).sum()
                lower = np.minimum(q * high, q * low).sum()
                scores.append(upper + self.sparsity.lower_bound_weight * lower)
        return max(scores)

    def _forward(self, tokens: NDArray, mask_of) -> F64:
        config, positions = self.config, self.length + np.arange(len(tokens))
        H, Hk, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.length += len(tokens)
        x = self.params["embed_tokens"]["embedding"][tokens]
        for l in range(config.num_hidden_layers):
            layer = self.params["layers"][l]
            attention = layer["self_attn"]
            qkv = _linear(self._norm(x, layer["input_layernorm"]), attention["qkv_proj"])
            q, k, v = np.split(qkv.reshape(len(tokens), -1, D), [H, H + Hk], axis=1)
            if config.qk_norm:
                q, k = self._norm(q, attention["q_norm"]), self._norm(k, attention["k_norm"])
            if l not in config.nope_layers:
                q, k = (_rotate(y, positions, config.rope.rope_theta) for y in (q, k))
            self.keys[l] = np.concatenate([self.keys[l], k])
            self.values[l] = np.concatenate([self.values[l], v])
            out = np.zeros(q.shape)
            for head in range(Hk):
                group = range(head * (H // Hk), (head + 1) * (H // Hk))
                mask = mask_of(l, head, q[:, group])
                for h in group:
                    scores = q[:, h] @ self.keys[l][:, head].T / np.sqrt(D)
                    weights = np.exp(log_softmax(np.where(mask, scores, -np.inf)))
                    out[:, h] = weights @ self.values[l][:, head]
            x = x + _linear(out.reshape(len(tokens), H * D), attention["o_proj"])
            gate_up = _linear(
                self._norm(x, layer["post_attention_layernorm"]), layer["mlp"]["gate_up_proj"]
            )
            gate, up = np.split(gate_up, 2, axis=-1)
            x = x + _linear(gate / (1 + np.exp(-gate)) * up, layer["mlp"]["down_proj"])
        x = self._norm(x, self.params["norm"])
        if config.tie_word_embeddings:
            return x @ self.params["embed_tokens"]["embedding"].T
        return x @ self.params["lm_head"]["kernel"]

    def _norm(self, x: F64, weights: dict) -> F64:
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.rms_norm_eps) * weights["scale"]


def _linear(x: F64, weights: dict) -> F64:
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def _rotate(x: F64, positions: NDArray, theta: float) -> F64:
    """RoPE of ``[T, heads, D]``: channels d and d + D/2 are a point in the plane, turned.

    Frequencies and angles are rounded to float32: models are trained and run that way, and far
    from the start of a text the rounding (1e-4 at 2,000) is a part of the function.
    """
    half = x.shape[-1] // 2
    frequencies = (theta ** (-np.arange(half) / half)).astype(np.float32)
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    points = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([points.real, points.imag], axis=-1)
