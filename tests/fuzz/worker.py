"""Loads mutated files, one for each number read from stdin, and writes what came of each.

    python worker.py FAMILY BASE

A case may take 20 seconds of CPU time; a process that takes more is killed by the kernel, which
the program that reads the results takes for a hang.
"""

import hashlib
import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from families import FAMILIES

import convert

SECONDS = 20
LONGEST_MESSAGE = 3000
CLEAR = (ValueError, NotImplementedError, OSError)
MESSAGES = [{"role": "user", "content": "the cat"}]


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode(errors="replace"))
    return found.hexdigest()


def load(family: str, base: Path, path: Path) -> str:
    """What ``path`` means to a user, as a digest: configuration, weights, ids, texts."""
    if family == "lora":
        config, params = convert.load(base / "hf", dtype=jnp.float32, adapter=path)
        return digest(config, *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))
    config, params = convert.load(path, dtype=jnp.float32)
    weights = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    tokenizer = convert.load_tokenizer(path)
    if tokenizer is None:
        return digest(config, *weights)
    text = "the cat <|user|> A:"
    ids = tokenizer.encode(text)
    if tokenizer.has_chat_template:
        text = tokenizer.apply_chat_template(MESSAGES)
    stream = tokenizer.stream()
    streamed = [*map(stream.step, ids), stream.flush()]
    known = (tokenizer.markers, tokenizer.eos_token_ids, ids, tokenizer.decode(ids), streamed, text)
    return digest(config, known, *weights)


def outcome(family: str, base: Path, path: Path) -> dict[str, str]:
    try:
        return {"outcome": "accepted", "detail": load(family, base, path)}
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        message = str(error)
        # A template's error comes long after loading: it names the template's line.
        named = str(path.parent) in message or message.startswith("the chat template failed")
        clear = isinstance(error, CLEAR) and named and len(message) <= LONGEST_MESSAGE
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        detail = f"{type(error).__name__} at {where}: {message[:300]}"
        return {"outcome": "refused" if clear else "unclear", "detail": detail}


def main() -> None:
    family, base = sys.argv[1], Path(sys.argv[2])
    cases = list(FAMILIES[family](base))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    print(len(cases), file=results, flush=True)
    for line in sys.stdin:
        case = cases[int(line)]
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            found = outcome(family, base, case.build(Path(directory)))
        print(json.dumps({"name": case.name, "expect": case.expect, **found}), file=results)
        results.flush()


if __name__ == "__main__":
    main()
