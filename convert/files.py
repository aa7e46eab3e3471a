"""Whether a checkpoint has a file."""

import os
from pathlib import Path


def is_file(path: Path) -> bool:
    """Whether there is a file at ``path``; False if there is nothing.

    Raises ``ValueError`` for a directory of that name, or a link to nothing: a file that is
    optional would be passed over, as if the checkpoint had none.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        what = "a directory" if path.is_dir() else "a link to nothing, or no regular file"
        raise ValueError(f"{path} must be a file, and is {what}")
    return False
