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
class Lengths:
    """The step lengths that a step is decided with, and those of the segments where there are any."""

    lr: float
    lr_rest: float | None
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, given: Any, n: int) -> "Lengths":
        """From a caller's segments, checked; decided with those of the segment with the largest lr."""
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"segments must be a list or tuple of Segment; got {type(given).__name__}")
        segments = []
        for k, one in enumerate(given):
            name = f"segments[{k}]"
            if not isinstance(one, Segment):
                raise TypeError(f"{name} must be a Segment; got {type(one).__name__}")
            rest = None if one.lr_rest is None else checks.real(one.lr_rest, f"{name}.lr_rest")
            length = checks.count(one.length, f"{name}.length")
            segments.append(Segment(length or 0, checks.real(one.lr, f"{name}.lr"), rest))
        if (total := sum(one.length for one in segments)) != n or not segments:
            raise ValueError(f"segments must cover the {n} coordinates of theta; got {len(segments)}, {total} in all")
        first = max(segments, key=lambda one: one.lr)
        return cls(first.lr, first.lr_rest, tuple(segments))

    @property
    def digest(self) -> float:
        """A number that tells ranks whether their segments are alike."""
        return float(int.from_bytes(hashlib.sha256(repr(self.segments).encode()).digest()[:6], "big"))

    def within(self, info: StepInfo, start: int, count: int) -> Iterator[tuple[int, int, float, float]]:
        """For each segment with any of these coordinates: its first among them, how many, τ and β."""
        first = -start
        for one in self.segments:
            begin, end = max(first, 0), min(first + one.length, count)
            first += one.length
            if begin < end:
                yield begin, end - begin, *self._of(one, info)

    def _of(self, one: Segment, info: StepInfo) -> tuple[float, float]:
        """τ and β of a segment, in proportion to what the decision made of those it was taken with."""
        tau, rest = (one.lr * (length / self.lr) if self.lr else length for length in (info.lr, info.lr_rest))
        if not info.accepted:  # averaged SGD has a single step length
            return tau, tau
        if one.lr_rest is not None:
            return tau, one.lr_rest
        return tau, tau if self.lr_rest is not None else rest


def finish(thetas: Rows, grads: Rows, info: StepInfo, out: Rows, compute: str, lengths: Lengths, start: int) -> None:
    """Write these coordinates of θ_new, from `start` on, to `out`, and in the record whether they are finite."""
    if not lengths.segments:
        backend(out).combine(thetas, grads, info, out=out, compute=compute)
        return
    info.record[RESULT] = 0
    for at, count, tau, beta in lengths.within(info, start, out.n):
        own = dataclasses.replace(info, record=info.record.copy())
        own.record[LR], own.record[LR_REST] = tau, beta
        rows = thetas.part(at, count), grads.part(at, count)
        backend(out).combine(*rows, own, out=out.part(at, count), compute=compute)
        info.record[RESULT] = max(info.record[RESULT], own.record[RESULT])
