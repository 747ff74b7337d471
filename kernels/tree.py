"""The one order in which the blocks' partial sums are added, whoever computes them.

Coordinates are cut into blocks; the parts of blocks 2i and 2i+1 are added, then these sums in pairs, and so on: a
binary tree over block indices.  A node without a right sibling is passed up as it is.  Whoever owns a run of blocks
keeps only the maximal complete subtrees of that run, so the bits of the total do not depend on how the blocks were
shared out over threads or ranks.
"""

from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """The sum over one subtree: blocks start … start + 2**level − 1, as far as they exist."""

    start: int
    level: int
    values: np.ndarray


def subtrees(first: int, last: int, blocks: int, largest: int = 62) -> list[tuple[int, int]]:
    """(start, level) of the maximal subtrees of at most 2**largest blocks that cover first … last−1, in order.

    At the right edge of the tree, where last == blocks, a subtree may reach beyond the last block.
    """
    found = []
    while first < last:
        level = min(largest, (first & -first).bit_length() - 1 if first else largest)
        while first + (1 << level) > last and last != blocks:
            level -= 1
        found.append((first, level))
        first += 1 << level
    return found


def merged(parts: list[Part], first: int, last: int, blocks: int) -> list[Part]:
    """The sums over the maximal subtrees of a run, from parts that cover it in order."""
    return [
        Part(start, level, total([part for part in parts if start <= part.start < start + (1 << level)]))
        for start, level in subtrees(first, last, blocks)
    ]


def total(parts: list[Part]) -> np.ndarray:
    """The sum over a subtree or over all blocks, from parts that cover it in order."""
    kept: list[Part] = []
    for part in parts:
        while kept and kept[-1].level == part.level and _is_left_sibling(kept[-1]):
            left = kept.pop()
            part = Part(left.start, left.level + 1, left.values + part.values)
        kept.append(part)
    values = kept.pop().values
    while kept:
        values = kept.pop().values + values
    return values


def _is_left_sibling(part: Part) -> bool:
    return part.start % (2 << part.level) == 0
