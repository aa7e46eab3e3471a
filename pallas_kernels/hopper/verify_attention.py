"""Paged attention for a few query tokens a row, as drafted ones to verify, Hopper (Mosaic GPU).

The kernels are those of ``decode_attention``, and so is the index map. Only the columns of its
matrices are more: the queries of all T tokens of a row that belong to a KV head, so that a tile of
K and V is read once for all of them:

      columns of KV head k    |  G heads of token 0  |  G heads of token 1  | ... |  padding  |
      attends positions <=    |     position         |     position + 1     |     |

      N = T * G rounded up to 8, at most 64 (``MOST_QUERIES``): else the tokens are cut into
      pieces, each of which reads K and V anew

What must move: as decode attention, and the parts, N / 8 times as large as there.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper.decode_attention import (
    Config,
    attend_lists,
    choose_config,
    unsupported,
)
from pallas_kernels.hopper.mosaic import refuse
from pallas_kernels.kv_codes import kv_kind
from pallas_kernels.types import KVPages, PageList

# Queries of a KV head whose matrices fit in the registers of a warpgroup, by what pages hold. (As
# many as wgmma takes of int8, too: between 32 and 64 its N is a multiple of 16.)
MOST_QUERIES = {None: 64, "int8": 32, "fp8": 40, "int4": 24}


@partial(jax.jit, static_argnames=("config",))
def verify_attention(
    q: Float[Array, "B T H D"],
    pages: KVPages,
    page_table: Int[Array, "B M"],
    position: Int[Array, " B"],
    *,
    config: Config | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """``pallas_kernels.api.verify_attention`` on a Hopper GPU (or under Mosaic GPU's interpreter).

    Query bf16, pages bf16 or codes of any kind; D 64 or 128; pages of 16 to 128 tokens; up to 16
    query heads a KV head. Shapes are those the api has checked. Raises ``NotImplementedError`` for
    anything else.
    """
    T, group = q.shape[1], q.shape[2] // pages.k.shape[0]
    reasons = unsupported(q, pages, pages)
    if group > 16:
        reasons.append(f"at most 16 query heads a KV head, got {group}")
    refuse("verify_attention", reasons)
    count = pl.cdiv(T, MOST_QUERIES[kv_kind(pages.k.dtype)] // group)
    size = pl.cdiv(T, count)  # tokens of a piece
    pieces = [
        _attend(q[:, t : t + size], pages, page_table, position, t, config)
        for t in range(0, T, size)
    ]
    outs, lses = zip(*pieces, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)


def _attend(
    q: Float[Array, "B T H D"],
    pages: KVPages,
    page_table: Int[Array, "B M"],
    position: Int[Array, " B"],
    first: int,
    config: Config | None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """The tokens from number ``first`` of a row on."""
    B, T, H, D = q.shape
    K, _, P = pages.k.shape[:3]
    group = H // K
    if config is None:
        most_tokens = (page_table.shape[1] * P,) * K
        config = choose_config(B, most_tokens, pages.k.dtype, T * group)
    stop = jnp.maximum(position + first + T, 0)[:, None]
    lists = PageList(page_table[:, None], jnp.zeros_like(stop), stop)
    of_heads = q.reshape(B, T, K, group, D).swapaxes(1, 2).reshape(B, K, T * group, D)
    out, lse = attend_lists(of_heads, [(pages, lists)], config, tokens=T)
    out = out.reshape(B, K, T, group, D).swapaxes(1, 2).reshape(B, T, H, D)
    return out, lse.reshape(B, K, T, group).swapaxes(1, 2).reshape(B, T, H)
