"""The step over MPI: one worker per rank, mpi4py communicators.

    exchange     what moves                                   sent per rank    memory per rank beyond θ and g
    allgather    Allgather of θ and g                         2n(m−1)          2mn + n
    sharded      Alltoall of g and θ, Allgather of θ_new      3n(m−1)/m        3n (2n with out=)

Every rank forms K's parts for its own blocks only and sends their maximal subtrees to rank 0, which completes the
tree, decides, and broadcasts c: the bits of θ_new are the same on every rank and equal to those of `fastnewton.step`
on the stacked rows.  With "sharded" a rank also combines its own blocks only.  Arrays on a device that are staged take
more: in all, with out=, 5n pinned and (2 + 1/m)n on the device, and (2m + 2)n and 2mn with "allgather".

`serve` and `Client` carry the Read and Write of a `fastnewton.server.ParameterServer` over MPI.
"""

try:
    import mpi4py  # noqa: F401
except ImportError as error:
    raise ImportError("fastnewton.mpi needs mpi4py: pip install 'fastnewton[mpi]'") from error

from fastnewton.mpi.newton import DistNewton
from fastnewton.mpi.parameter_server import Client, serve
from fastnewton.mpi.segments import Segment

__all__ = ["Client", "DistNewton", "Segment", "serve"]
