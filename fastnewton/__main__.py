"""`python -m fastnewton` prints the configuration, under a launcher with what MPI says once it is initialised."""

import contextlib
import importlib
import os

from fastnewton.config import show_config
from fastnewton.environment import foreign_launcher

if foreign_launcher(os.environ, None):
    with contextlib.suppress(ImportError):
        importlib.import_module("mpi4py.MPI")
show_config()
