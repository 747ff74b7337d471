"""Working memory that is kept between calls: the pages of fresh memory cost more than what is done in them."""

import numpy as np

KEPT_BYTES = 1 << 24  # larger arrays come in huge pages, where there are such

_kept: list[np.ndarray] = []


def borrowed(count: int) -> np.ndarray:
    """Room for so many float64 numbers, for this call alone; what is in it is undefined."""
    try:
        room = _kept.pop()  # of two threads, one finds it
    except IndexError:
        return np.empty(count)
    return room[:count] if room.size >= count else np.empty(count)


def returned(room: np.ndarray) -> None:
    """Keep it for the next call, unless another is kept."""
    whole = room if room.base is None else room.base
    if not _kept and whole.nbytes <= KEPT_BYTES:
        _kept.append(whole)


def release() -> None:
    """Keep nothing."""
    _kept.clear()
