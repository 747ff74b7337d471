"""tree: the one order in which the blocks' partial sums are added, whoever computes them.

Coordinates are cut into blocks; the parts of blocks 2i and 2i+1 are added, then these sums in pairs, and so on: a
binary tree over block indices.  A node without a right sibling is passed up as it is.  Whoever owns a run of blocks
keeps only the maximal complete subtrees of that run, so the bits of the total do not depend on how the blocks were
shared out over threads or ranks.

A part is the sum over one subtree, blocks start … start + 2**level − 1 as far as they exist, and (start, level) its
place.  Parts are rows of an array (parts, size) beside an array of their places (parts, 2).
"""

import itertools

import numpy as np

from fastnewton.kernels.cpu.jit import INT, INTS_2D, entry, jit
from fastnewton.kernels.cpu.memory import copy, floats, integers, stack_memory

BLOCK = 1024  # coordinates of one part; a float32 accumulator is one lane, so it takes BLOCK/lanes ≤ 256 terms


def blocks(n: int) -> int:
    """Count the blocks that n coordinates are cut into."""
    return -(-n // BLOCK)


def subtrees(first: int, last: int, blocks: int, largest: int = 62) -> list[tuple[int, int]]:
    """Return (start, level) of the maximal subtrees of at most 2**largest blocks that cover first … last−1, in order.

    At the right edge of the tree, where last == blocks, a subtree may reach beyond the last block.
    """
    places = []
    while first < last:
        level = min(largest, (first & -first).bit_length() - 1 if first else largest)
        while first + (1 << level) > last and last != blocks:
            level -= 1
        places.append((first, level))
        first += 1 << level
    return places


def merge(places: np.ndarray, parts: np.ndarray, first: int, last: int, blocks: int) -> np.ndarray:
    """Add up parts that cover a run in order, and are overwritten, to those of its maximal subtrees."""
    if first == 0 and last == blocks > 0:
        return total(places, parts)[None]
    starts = [start for start, _ in subtrees(first, last, blocks)]
    bounds = [*np.searchsorted(places[:, 0], starts), len(places)]
    groups = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return np.array([total(places[group], parts[group]) for group in groups]).reshape(-1, parts.shape[1])


def total(places: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return the sum (size,) over a subtree or over all blocks, from parts that cover it in order, and are overwritten;
    zeros where there is no part."""
    if len(parts) == 0:
        return np.zeros(parts.shape[1])
    _add_up(places, parts.ctypes.data, parts.shape[1])
    return parts[0]


@jit
def add_up(places, first, size):
    """Add parts of that size, the first at that address, up to the first."""
    starts, levels = integers(stack_memory(128)), integers(stack_memory(128))  # of nodes without their right sibling
    height = 0
    for index in range(places.shape[0]):
        start, level = places[index, 0], places[index, 1]
        if height < index:
            copy(first + 8 * size * height, first + 8 * size * index, 8 * size)
        while height and levels[height - 1] == level and starts[height - 1] & ((2 << level) - 1) == 0:
            height -= 1
            add_to(first + 8 * size * height, first + 8 * size * (height + 1), size)
            start, level = starts[height], level + 1
        starts[height], levels[height] = start, level
        height += 1
    while height > 1:
        height -= 1
        add_to(first + 8 * size * (height - 1), first + 8 * size * height, size)


@jit
def add_to(left, right, size):
    """Add so many float64 to those at another address."""
    sums, terms = floats(left), floats(right)
    for k in range(size):
        sums[k] += terms[k]


_add_up = entry(add_up, INTS_2D, INT, INT)
