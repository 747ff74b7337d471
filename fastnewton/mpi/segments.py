"""Stretches of the parameters that have step lengths of their own, all from one Gram."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastnewton import checks
from fastnewton.arrays import Rows
from fastnewton.backends import backend
from fastnewton.kernels.record import LR, LR_REST, RESULT
from fastnewton.results import StepInfo


class Segment(NamedTuple):
    """So many coordinates, and their step lengths: θ_new = θ̄ − τΘc − β(ḡ − Gc) with the c of all segments."""

    length: int
    lr: float
    lr_rest: float | None = None


@dataclass(frozen=True)
class StepLengths:
    """The step lengths that a step is decided with, and those of the segments where there are any."""

    lr: float
    lr_rest: float | None
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of_segments(cls, segments: Any, n: int) -> "StepLengths":
        """Check a caller's segments; the step is decided with those of the segment with the largest lr."""
        if not isinstance(segments, (list, tuple)):
            raise TypeError(f"segments must be a list or tuple of Segment; got {type(segments).__name__}")
        checked = tuple(_check_segment(segment, f"segments[{k}]") for k, segment in enumerate(segments))
        if (total := sum(segment.length for segment in checked)) != n or not checked:
            raise ValueError(f"segments must cover the {n} coordinates of theta; got {len(checked)}, {total} in all")
        longest = max(checked, key=lambda segment: segment.lr)
        return cls(longest.lr, longest.lr_rest, checked)

    @property
    def digest(self) -> float:
        """Hash the segments, to compare them between ranks."""
        return float(int.from_bytes(hashlib.sha256(repr(self.segments).encode()).digest()[:6], "big"))

    def within(self, info: StepInfo, shard: slice) -> Iterator[tuple[slice, float, float]]:
        """Yield the part of the shard that each segment covers, counted from the shard's start, with τ and β."""
        end = -shard.start
        for segment in self.segments:
            begin, end = end, end + segment.length
            part = slice(max(begin, 0), min(end, shard.stop - shard.start))
            if part.start < part.stop:
                yield part, *self._scale(segment, info)

    def _scale(self, segment: Segment, info: StepInfo) -> tuple[float, float]:
        """Change τ and β of a segment in proportion to what the decision made of those it was taken with."""
        tau, rest = (segment.lr * (length / self.lr) if self.lr else length for length in (info.lr, info.lr_rest))
        if not info.accepted:  # averaged SGD has a single step length
            return tau, tau
        if segment.lr_rest is not None:
            return tau, segment.lr_rest
        return tau, tau if self.lr_rest is not None else rest


def _check_segment(segment: Any, name: str) -> Segment:
    if not isinstance(segment, Segment):
        raise TypeError(f"{name} must be a Segment; got {type(segment).__name__}")
    rest = None if segment.lr_rest is None else checks.real(segment.lr_rest, f"{name}.lr_rest")
    length = checks.count(segment.length, f"{name}.length")
    return Segment(length or 0, checks.real(segment.lr, f"{name}.lr"), rest)


def combine(
    thetas: Rows, grads: Rows, info: StepInfo, out: Rows, compute: str, lengths: StepLengths, shard: slice
) -> None:
    """Write this shard of θ_new to `out`, and in the record whether it is finite."""
    if not lengths.segments:
        backend(out).combine(thetas, grads, info, out=out, compute=compute)
        return
    info.record[RESULT] = 0
    for part, tau, beta in lengths.within(info, shard):
        scaled = dataclasses.replace(info, record=info.record.copy())
        scaled.record[LR], scaled.record[LR_REST] = tau, beta
        first, count = part.start, part.stop - part.start
        rows = (each.part(first, count) for each in (thetas, grads))
        backend(out).combine(*rows, scaled, out=out.part(first, count), compute=compute)
        info.record[RESULT] = max(info.record[RESULT], scaled.record[RESULT])
