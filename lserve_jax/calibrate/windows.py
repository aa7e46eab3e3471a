"""What heads are measured on: the ends of long sequences, with passkeys and of plain text.

Passkeys show which heads fetch what was said long ago, the text which ones ordinary reading needs;
a head may matter to either alone.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32

from lserve_jax.calibrate.passkeys import PasskeySamples, PasskeySettings
from lserve_jax.calibrate.sensitivity import Measurement
from lserve_jax.tokenizer import Text, Tokenizer, text_ids


def measured_sequences(
    tokenizer: Tokenizer,
    text: Text,
    passkeys: PasskeySettings,
    measurement: Measurement,
) -> list[Int32[np.ndarray, " T"]]:
    """Sequences of ``measurement.length`` tokens: ``windows`` samples, then as many of the text.

    Samples are those of gate training at this length; what is asked and answered fills the window.
    Those of the text (or of its token ids) begin at points evenly spread over it. Of ``passkeys``
    the lengths are not used.

    Raises ``ValueError`` if the text is shorter than a sequence, if the passkeys do not fit one,
    or if their questions and answers do not fill a window.
    """
    length, count = measurement.length, measurement.windows
    begin = tokenizer.encode("")  # what every text of this tokenizer begins with
    ids = text_ids(tokenizer, text)
    if len(ids) < length:
        raise ValueError(
            f"the text has {len(ids)} tokens, context={measurement.context} and "
            f"window={measurement.window} need {length}"
        )
    settings = dataclasses.replace(passkeys, max_length=length, num_lengths=1)
    sample = PasskeySamples(tokenizer, ids, settings)
    samples = [sample(i) for i in range(count)]
    answers = min(length - first_label for _, first_label in samples)
    if answers < measurement.window:
        raise ValueError(
            f"window={measurement.window} exceeds the {answers} tokens in which "
            f"num_passkeys={passkeys.num_passkeys} are asked for and answered"
        )
    body = length - len(begin)
    starts = [(len(ids) - body) * (2 * i + 1) // (2 * count) for i in range(count)]
    sequences = [tokens for tokens, _ in samples]
    sequences += [np.array([*begin, *ids[start : start + body]], np.int32) for start in starts]
    return sequences
