"""What a step has to move and to compute at the least, and how long that takes on a given machine.

    pass      bytes                    flops
    gram      m·n·itemsize             m(m+1)n + 2mn
    combine   (2m + 1)·n·itemsize      6mn

gram reads the gradients; combine reads parameters and gradients and writes the new parameters.  The
eigenproblem, O(m³), is not counted.  A pass takes at least max(bytes/bandwidth, flops/rate).
"""

from dataclasses import dataclass

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Pass:
    """Bytes moved and operations done by one pass over the arrays."""

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The least time, for bandwidth in bytes/s and rate in flops/s."""
        return max(self.bytes / bandwidth, self.flops / rate)


def gram(m: int, n: int, itemsize: int) -> Pass:
    """K = GᵀG and b = Gᵀḡ: one read of the gradients."""
    return Pass(m * n * itemsize, m * (m + 1) * n + 2 * m * n)


def combine(m: int, n: int, itemsize: int) -> Pass:
    """θ̄ − τΘc − β(ḡ − Gc): one read of both arrays, one write of the result."""
    return Pass((2 * m + 1) * n * itemsize, 6 * m * n)


def step(m: int, n: int, itemsize: int) -> Pass:
    """Both passes together; their least times add up, so `seconds` is the function below."""
    first, second = gram(m, n, itemsize), combine(m, n, itemsize)
    return Pass(first.bytes + second.bytes, first.flops + second.flops)


def seconds(m: int, n: int, itemsize: int, bandwidth: float, rate: float) -> float:
    """Roofline time of a step: the sum over its two passes."""
    return sum(part(m, n, itemsize).seconds(bandwidth, rate) for part in (gram, combine))
