"""The one order in which the blocks' partial sums are added, whoever computes them.

Coordinates are cut into blocks; the parts of blocks 2i and 2i+1 are added, then these sums in pairs, and so on: a
binary tree over block indices.  A node without a right sibling is passed up as it is.  Whoever owns a run of blocks
keeps only the maximal complete subtrees of that run, so the bits of the total do not depend on how the blocks were
shared out over threads or ranks.

A part is the sum over one subtree, blocks start … start + 2**level − 1 as far as they exist, and (start, level) its
place.  Parts are rows of an array (parts, size) beside an array of their places (parts, 2).
"""

import itertools

import numpy as np

from fastnewton.kernels.cpu.jit import FLOATS_2D, INTS_2D, entry, jit

BLOCK = 1024  # coordinates of one part; a float32 accumulator is one lane, so it takes BLOCK/lanes ≤ 256 terms


def blocks(n: int) -> int:
    """Number of blocks that n coordinates are cut into."""
    return -(-n // BLOCK)


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


def merged(places: np.ndarray, parts: np.ndarray, first: int, last: int, blocks: int) -> np.ndarray:
    """The parts of the maximal subtrees of a run, from parts that cover it in order, and are overwritten."""
    if first == 0 and last == blocks > 0:
        return total(places, parts)[None]
    starts = [start for start, _ in subtrees(first, last, blocks)]
    bounds = [*np.searchsorted(places[:, 0], starts), len(places)]
    groups = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return np.array([total(places[group], parts[group]) for group in groups]).reshape(-1, parts.shape[1])


def total(places: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The sum (size,) over a subtree or over all blocks, from parts that cover it in order, and are overwritten; zeros
    of none."""
    return _summed(places, parts)


@jit
def add_up(places, parts):
    kept = np.empty_like(places)
    height = 0
    for index in range(len(places)):
        start, level = places[index]
        parts[height] = parts[index]
        while height and kept[height - 1, 1] == level and kept[height - 1, 0] % (2 << level) == 0:
            height -= 1
            add_to(parts[height], parts[height + 1])
            start, level = kept[height, 0], level + 1
        kept[height, 0], kept[height, 1] = start, level
        height += 1
    while height > 1:
        height -= 1
        add_to(parts[height - 1], parts[height])
    return parts[0].copy() if height else np.zeros(parts.shape[1])


@jit
def add_to(left, right):
    for k in range(left.size):
        left[k] += right[k]


_summed = entry(add_up, INTS_2D, FLOATS_2D)
