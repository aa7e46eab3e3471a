"""A selection policy of one's own: what it is given, and what it returns.

    def newest(pages: Candidates):
        count = jnp.minimum(pages.wanted, pages.candidates[:, None])  # [B, Kq]
        first = pages.candidates[:, None] - count
        return count, first[:, :, None] + jnp.arange(pages.most)

    LLM(model, attention="lserve", sparsity=SparsityConfig(select=newest))

The function is traced into the decode step, where it replaces ``page_scores`` and ``select_pages``.
It is a part of what was compiled: another function, even one of the same code, compiles anew.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Candidates(NamedTuple):
    """What the Kq ranked heads of a layer may choose from, for each of B rows.

    Pages are of ``selected_page_size`` tokens and are numbered from the sequence's beginning; N is
    the most that a sequence has. Those from ``candidates`` on are attended in any case: they are
    the newest, and no part of what is chosen.
    """

    layer: int
    most: int  # pages that a head can get
    query: Float[Array, "B Hq D"]  # rotated; G query heads of each ranked head, one after the other
    scores: Float[Array, "B Kq N"]  # float32, of the built-in policy; -inf past the sequence's end
    # Largest and smallest key of each logical page, channel by channel; n of them make a page.
    key_stats: Float[Array, "B Kq N n 2 D"]
    length: Int[Array, " B"]  # tokens of each row, the newest included; 0: there is none
    candidates: Int[Array, " B"]  # pages to choose from
    wanted: Int[Array, "B Kq"]  # pages that the budget allows, newest pages beside them


# Returns how many pages each head takes, [B, Kq], and their numbers, [B, Kq, n] with n at most
# ``most``, in any order, none twice. What stands behind the count is not read.
Select = Callable[[Candidates], tuple[Int[Array, "B Kq"], Int[Array, "B Kq n"]]]
