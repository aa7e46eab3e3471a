"""The public ops that choose which pages decode reads; ``api`` has them beside the others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    check_range,
    expect_groups,
    expect_int32,
    expect_most_heads,
    expect_page_sizes,
    expect_shape,
)
from pallas_kernels.device import Backend, implementation


def page_scores(
    q: Float[Array, "B Hr D"],
    key_stats: Float[Array, "Kq N g 2 D"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    *,
    page_size: int,
    selected_page_size: int,
    lower_bound_weight: float = 0.0,
    most_heads: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B Kq M*m"]:
    """How much a selected page can matter to each ranked KV head (LServe, hierarchical paging).

    A selected page has ``selected_page_size`` tokens: it is a logical page, a whole page as in the
    paper, or something between; m = page_size // selected_page_size of them make a page.

    score = max over the group's query heads and its logical pages of upper + w * lower:
    upper = sum_d max(q_d * kmax_d, q_d * kmin_d) and lower = sum_d min(q_d * kmax_d, q_d * kmin_d)
    bound q . k over the logical page's tokens (up to the rounding of statistics kept in a narrower
    dtype than the keys'). w is ``lower_bound_weight``, in [0, 1]; 0 is the papers' bound.
    ``q`` holds the rotated queries of the Kq ranked heads only. A selected page with none of the
    sequence's first ``length`` tokens scores -inf. Raises ``ValueError`` for a weight outside
    [0, 1] and for sizes of logical, selected and whole pages that do not divide one another.

    ``most_heads``, None: Kq, is the most ranked heads of any layer. The result does not depend on
    it: layers that agree on it share one kernel.

    >>> import jax.numpy as jnp
    >>> args = jnp.ones((1, 2, 8)), jnp.ones((1, 4, 2, 2, 8)), jnp.array([[3, 1]]), jnp.array([10])
    >>> page_scores(*args, page_size=32, selected_page_size=32).tolist()
    [[[8.0, -inf]]]
    >>> page_scores(*args, page_size=32, selected_page_size=16).tolist()
    [[[8.0, -inf, -inf, -inf]]]
    """
    expect_most_heads(most_heads, key_stats.shape[0])
    if not 0.0 <= lower_bound_weight <= 1.0:
        raise ValueError(f"{lower_bound_weight=} must lie in [0, 1]")
    expect_shape("q", q, (None, None, None))
    B, Hr, D = q.shape
    expect_shape("key_stats", key_stats, (None, None, None, 2, D))
    expect_int32((B, None), page_table=page_table)
    expect_int32((B,), length=length)
    expect_page_sizes(page_size, selected_page_size, key_stats.shape[2])
    if Hr == key_stats.shape[0] == 0:
        return jnp.zeros((B, 0, page_table.shape[1] * (page_size // selected_page_size)))
    expect_groups(Hr, key_stats.shape[0])
    check_range("length", length, page_table.shape[1] * page_size)
    used = jnp.arange(page_table.shape[1])[None] * page_size < length[:, None]
    check_range("page_table", jnp.where(used, page_table, 0), key_stats.shape[1] - 1)
    return implementation("page_scores", backend)(
        q,
        key_stats,
        page_table,
        length,
        page_size=page_size,
        selected_page_size=selected_page_size,
        lower_bound_weight=lower_bound_weight,
        most_heads=most_heads,
    )


def select_pages(
    scores: Float[Array, "B Kq M"],
    num_candidates: Int[Array, " B"],
    wanted: Int[Array, "B Kq"],
    *,
    num_pages: int,
    sink_pages: int,
    most_heads: int | None = None,
    backend: Backend = "auto",
) -> Int[Array, "B Kq R"]:
    """The ``wanted`` highest-scoring of each row's first ``num_candidates`` selected pages.

    A score is that of one selected page (see ``page_scores``), and all counts and numbers here are
    of such pages. Numbers 0..sink_pages-1 always win and count as wanted; among equal scores the
    lower number wins. Returns numbers within the sequence in ascending order (attention does not
    ask for the best first), then -1 from min(wanted, num_candidates) on. R = min(num_pages, M), and
    no head may want more than ``num_pages``. With num_candidates <= wanted everything is selected:
    the exact, dense case. ``most_heads`` is as in ``page_scores``.

    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[[0.0, 5.0, 1.0, 9.0], [3.0, 1.0, 2.0, 0.0]]])
    >>> how = {"num_pages": 3, "sink_pages": 1}
    >>> select_pages(scores, jnp.array([3]), jnp.array([[2, 3]]), **how).tolist()
    [[[0, 1, -1], [0, 1, 2]]]
    """
    expect_shape("scores", scores, (None, None, None))
    expect_most_heads(most_heads, scores.shape[1])
    expect_int32(scores.shape[:1], num_candidates=num_candidates)
    expect_int32(scores.shape[:2], wanted=wanted)
    if not 0 <= sink_pages <= num_pages:
        raise ValueError(f"need 0 <= sink_pages <= num_pages, got {sink_pages=} {num_pages=}")
    check_range("num_candidates", num_candidates, scores.shape[-1])
    check_range("wanted", wanted, num_pages)
    num_pages = min(num_pages, scores.shape[-1])
    if scores.shape[1] == 0:
        return jnp.zeros((*scores.shape[:2], num_pages), jnp.int32)
    how = {"num_pages": num_pages, "sink_pages": sink_pages, "most_heads": most_heads}
    return implementation("select_pages", backend)(scores, num_candidates, wanted, **how)
