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
    """Choose the buffers for arrays like these."""
    if like.device.kind == "cpu":
        return HostBuffers(like)
    return (DeviceBuffers if gpu_aware.verdict()[0] else PinnedBuffers)(like)


class HostBuffers:
    """Arrays in CPU memory are sent and received where they are."""

    def __init__(self, like: Rows):
        self.word = DTYPES[like.dtype].word

    def allocate(self, shape: tuple[int, int]) -> Any:
        """Allocate memory for what other ranks send."""
        return arrays.allocate(shape, self.word)

    def prepare_send(self, vector: Rows, pieces: list[slice]) -> Callable[[int], Any]:
        """Make a caller's vector sendable, piece by piece."""
        return lambda k: vector.raw_bits[pieces[k]]

    def make_rows(self, stack: Any, like: Rows) -> Rows:
        """Make received vectors readable by kernels."""
        return arrays.rows_of(stack, like.dtype)

    def open_result(self, target: Rows) -> Any:
        """Allocate, or take from the caller, memory in which the shards of θ_new come together."""
        return target.raw_bits

    def write_shard(self, write: Callable[[Rows], None], target: Rows, shard: slice, whole: Any) -> None:
        """Have this shard of θ_new written into `whole`."""
        write(target.part(shard.start, shard.stop - shard.start))

    def deliver(self, whole: Any, target: Rows) -> None:
        """Bring the complete θ_new to where the caller wants it."""


class DeviceBuffers(HostBuffers):
    """Device memory; MPI knows of no stream, so that it is called only when what was enqueued is done."""

    def allocate(self, shape: tuple[int, int]) -> Any:
        return jit.cupy().empty(shape, self.word)

    def prepare_send(self, vector: Rows, pieces: list[slice]) -> Callable[[int], Any]:
        raw_bits = memory.view(vector, self.word)
        jit.cupy().cuda.get_current_stream().synchronize()
        return lambda k: raw_bits[pieces[k]]

    def make_rows(self, stack: Any, like: Rows) -> Rows:
        m, n = stack.shape
        table = stack.data.ptr + n * self.word.itemsize * np.arange(m, dtype=np.int64)
        return like._replace(table=table, n=n, owner=stack)

    def open_result(self, target: Rows) -> Any:
        return memory.view(target, self.word)


class PinnedBuffers(DeviceBuffers):
    """Pinned memory of CuPy's pool; one piece is copied while those before it are sent."""

    def allocate(self, shape: tuple[int, int]) -> Any:
        return memory.pinned(shape, self.word)

    def prepare_send(self, vector: Rows, pieces: list[slice]) -> Callable[[int], Any]:
        raw_bits = memory.pinned((vector.n,), self.word)
        copies = [
            memory.copy_to_host(vector.part(piece.start, piece.stop - piece.start), raw_bits[piece]) for piece in pieces
        ]

        def wait_for_copy(k: int) -> np.ndarray:
            copies[k].synchronize()
            return raw_bits[pieces[k]]

        return wait_for_copy

    def make_rows(self, stack: Any, like: Rows) -> Rows:
        return super().make_rows(memory.upload(stack), like)

    def open_result(self, target: Rows) -> Any:
        return memory.pinned((target.n,), self.word)

    def write_shard(self, write: Callable[[Rows], None], target: Rows, shard: slice, whole: Any) -> None:
        on_device = jit.cupy().empty(shard.stop - shard.start, self.word)
        rows = target._replace(table=np.array([on_device.data.ptr], np.int64), n=on_device.size)
        write(rows)
        memory.copy_to_host(rows, whole[shard]).synchronize()

    def deliver(self, whole: Any, target: Rows) -> None:
        memory.copy_to_device(whole, target)
