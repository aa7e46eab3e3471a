"""A text's own tokens as the test: perplexity, and agreement of two settings' predictions.

A window of the text is one document. At each of some lengths its tokens before are the prompt and
the ``scored`` tokens that end there are fed through decode steps (``scoring.score``): so a window
shows how a setting does at several positions of one text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lserve_jax.engine.scoring import Score, score
from lserve_jax.llm import LLM
from lserve_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens 0 to ``length - 1`` of one window; the last ``scored`` of them are predicted."""

    source: str  # the text that it is part of
    window: int
    length: int
    scored: int
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one setting thought of a window's scored tokens, in numbers a report can hold."""

    logprobs: Float[np.ndarray, " n"]  # natural, of the text's tokens
    # Against the reference setting; None unless agreement was asked for.
    divergence: Float[np.ndarray, " n"] | None  # KL(reference || this) in nats
    same_token: np.ndarray | None  # [n] bool, both hold the same token the likeliest


def make_windows(
    tokenizer: Tokenizer,
    text_ids: Sequence[int],
    *,
    source: str,
    lengths: Sequence[int],
    windows: int,
    scored: int,
) -> list[Window]:
    """``windows`` windows, spread evenly over the text ``source``, each at all ``lengths``.

    They overlap where the text is shorter than all of them together. Each begins with BOS if the
    tokenizer begins texts with it.

    Raises ``ValueError`` if the text is shorter than the longest window, there is no window, or
    ``scored`` does not leave a token of prompt.
    """
    if windows < 1:
        raise ValueError(f"{windows=} must be at least 1")
    if not 1 <= scored < min(lengths):
        raise ValueError(
            f"{scored=} tokens must be at least 1 and fewer than the shortest of {lengths=}"
        )
    begin = tokenizer.encode("")  # BOS, if any
    longest = max(lengths) - len(begin)
    if len(text_ids) < longest:
        raise ValueError(
            f"the text has {len(text_ids)} tokens, a window of {max(lengths)} needs {longest}"
        )
    starts = [(len(text_ids) - longest) * i // max(windows - 1, 1) for i in range(windows)]
    return [
        Window(
            source=source,
            window=number,
            length=length,
            scored=scored,
            token_ids=[*begin, *text_ids[start : start + length - len(begin)]],
        )
        for length in lengths
        for number, start in enumerate(starts)
    ]


def predict(
    llm: LLM,
    windows: Sequence[Window],
    reference: list[Score] | None,
    *,
    agreement: bool,
    progress: Callable[[int], object],
) -> tuple[list[Prediction], list[Score]]:
    """Scores all windows; with ``agreement`` also compares them to ``reference``.

    Without a reference these scores are it: they are returned too, and with ``agreement`` hold the
    distributions, 4 V bytes for every scored token. ``progress`` is called with the number of
    windows done since the last call.
    """
    predictions, kept = [], []
    step = llm.spec.max_num_seqs
    for first in range(0, len(windows), step):
        batch = windows[first : first + step]
        scores = score(
            llm.engine,
            [w.token_ids[: -w.scored] for w in batch],
            [w.token_ids[-w.scored :] for w in batch],
            distributions=agreement,
        )
        progress(len(batch))
        if reference is None:
            kept += scores
        for i, new in enumerate(scores):
            divergence = same = None
            if agreement:
                old = new if reference is None else reference[first + i]
                divergence = kl_divergence(old, new)
                same = old.likeliest == new.likeliest
            predictions.append(
                Prediction(logprobs=new.logprobs, divergence=divergence, same_token=same)
            )
    return predictions, kept if reference is None else reference


def kl_divergence(reference: Score, other: Score) -> Float[np.ndarray, " n"]:
    """KL(reference || other) of the next-token distributions, in nats, at every scored token."""
    p, q = reference.distributions, other.distributions
    assert p is not None and q is not None  # predict asks for them
    p64 = p.astype(np.float64)
    return (np.exp(p64) * (p64 - q)).sum(axis=-1)
