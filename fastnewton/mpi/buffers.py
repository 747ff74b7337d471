"""Memory that MPI reads and writes: the caller's own, on a device where the library takes it, or pinned copies."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastnewton import arrays
from fastnewton.arrays import Rows
from fastnewton.dtypes import DTYPES
from fastnewton.kernels.cuda import jit, memory
from fastnewton.mpi import gpu_aware


def buffers(like: Rows) -> "HostBuffers":
    """Those for arrays like these."""
    if like.device.kind == "cpu":
        return HostBuffers(like)
    return (DeviceBuffers if gpu_aware.verdict()[0] else PinnedBuffers)(like)


class HostBuffers:
    """Arrays in CPU memory are sent and received where they are."""

    def __init__(self, like: Rows):
        self.word = DTYPES[like.dtype].word

    def receiving(self, shape: tuple[int, int]) -> Any:
        """Memory for what other ranks send."""
        return arrays.allocate(shape, self.word)

    def outgoing(self, one: Rows, pieces: list[slice]) -> Callable[[int], Any]:
        """A caller's vector as MPI can send it, piece by piece."""
        words = one.raw_bits
        return lambda k: words[pieces[k]]

    def rows(self, stack: Any, like: Rows) -> Rows:
        """What was received, as kernels can read it."""
        return arrays.rows_of(stack, like.dtype)

    def collecting(self, target: Rows) -> Any:
        """Memory in which the shards of θ_new come together."""
        return target.raw_bits

    def finish(self, write: Callable[[Rows], None], target: Rows, piece: slice, whole: Any) -> None:
        """Have this piece of θ_new written, so that it is in `whole`."""
        write(target.part(piece.start, piece.stop - piece.start))

    def deliver(self, whole: Any, target: Rows) -> None:
        """θ_new has come together where the caller wants it."""


class DeviceBuffers(HostBuffers):
    """Device memory; MPI knows of no stream, so that what was enqueued is waited for before it is called."""

    def receiving(self, shape: tuple[int, int]) -> Any:
        return jit.cupy().empty(shape, self.word)

    def outgoing(self, one: Rows, pieces: list[slice]) -> Callable[[int], Any]:
        words = memory.view(one, self.word)
        jit.cupy().cuda.get_current_stream().synchronize()
        return lambda k: words[pieces[k]]

    def rows(self, stack: Any, like: Rows) -> Rows:
        step = stack.shape[1] * self.word.itemsize
        return like._replace(table=stack.data.ptr + step * np.arange(len(stack), dtype=np.int64), owner=stack)

    def collecting(self, target: Rows) -> Any:
        return memory.view(target, self.word)


class PinnedBuffers(DeviceBuffers):
    """Pinned memory of CuPy's pool; one piece is copied while those before it are sent."""

    def receiving(self, shape: tuple[int, int]) -> Any:
        return memory.pinned(shape, self.word)

    def outgoing(self, one: Rows, pieces: list[slice]) -> Callable[[int], Any]:
        words = memory.pinned((one.n,), self.word)
        copied = [
            memory.copy_to_host(one.part(piece.start, piece.stop - piece.start), words[piece]) for piece in pieces
        ]

        def piece(k: int) -> np.ndarray:
            copied[k].synchronize()
            return words[pieces[k]]

        return piece

    def rows(self, stack: Any, like: Rows) -> Rows:
        return super().rows(memory.upload(stack), like)

    def collecting(self, target: Rows) -> Any:
        return memory.pinned((target.n,), self.word)

    def finish(self, write: Callable[[Rows], None], target: Rows, piece: slice, whole: Any) -> None:
        shard = jit.cupy().empty(piece.stop - piece.start, self.word)
        there = target._replace(table=np.array([shard.data.ptr], np.int64), n=shard.size)
        write(there)
        memory.copy_to_host(there, whole[piece]).synchronize()

    def deliver(self, whole: Any, target: Rows) -> None:
        memory.copy_to_device(whole, target)
