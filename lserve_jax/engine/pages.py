"""Physical pages and who holds them."""

from collections.abc import Sequence

import numpy as np


class PagePool:
    """Physical pages with reference counts: a page is free when nobody holds it."""

    def __init__(self, num_pages: int):
        self.references = np.zeros((num_pages,), np.int32)
        self.free = list(range(num_pages))[::-1]

    def take(self, count: int) -> list[int]:
        """``count`` free pages, now held once; there must be as many."""
        if count > len(self.free):
            raise ValueError(f"{count} pages are wanted, {len(self.free)} are free")
        pages = [self.free.pop() for _ in range(count)]
        self.references[pages] += 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Holds pages that somebody holds already."""
        self.references[list(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page."""
        self.references[list(pages)] -= 1
        self.free.extend(page for page in pages if self.references[page] == 0)
