"""Where the kernels are told to read and write."""

import contextlib
from unittest import mock

from fastnewton.arrays import rows, single
from fastnewton.kernels.cpu import combine as combine_kernel
from fastnewton.kernels.cpu import gram as gram_kernel
from fastnewton.kernels.cpu import step as step_kernel


@contextlib.contextmanager
def reads():
    """The addresses of rows, by argument, that the kernels are first given for it inside the block."""
    seen, gram, joint_gram, combine = {}, gram_kernel.gram, gram_kernel.joint_gram, combine_kernel.combine
    gram_with_thetas = gram_kernel.gram_with_thetas
    step, step_of_arrays = step_kernel.step, step_kernel.step_of_arrays

    def note(**arguments):
        for name, given in arguments.items():
            if given is not None:
                seen.setdefault(name, tuple(given.table.tolist()))

    def spied_gram(grads, z=None, thetas=None, **options):
        note(grads=grads, z=z, thetas=thetas)
        return gram(grads, z, thetas, **options)

    def spied_joint_gram(thetas, grads):
        note(thetas=thetas, grads=grads)
        return joint_gram(thetas, grads)

    def spied_gram_with_thetas(thetas, grads, z=None, **options):
        note(thetas=thetas, grads=grads, z=z)
        return gram_with_thetas(thetas, grads, z, **options)

    def spied_combine(thetas, grads, coefficients, *, out, z=None, **options):
        note(thetas=thetas, grads=grads, z=z, out=out)
        return combine(thetas, grads, coefficients, out=out, z=z, **options)

    def spied_step(thetas, grads, out, *settings, **options):
        note(thetas=thetas, grads=grads, out=out)
        return step(thetas, grads, out, *settings, **options)

    def spied_step_of_arrays(thetas, grads, out, *settings, **options):
        note(thetas=rows(thetas, "thetas"), grads=rows(grads, "grads"), out=single(out, "out"))
        return step_of_arrays(thetas, grads, out, *settings, **options)

    with (
        mock.patch.multiple(
            gram_kernel, gram=spied_gram, joint_gram=spied_joint_gram, gram_with_thetas=spied_gram_with_thetas
        ),
        mock.patch.object(combine_kernel, "combine", spied_combine),
        mock.patch.multiple(step_kernel, step=spied_step, step_of_arrays=spied_step_of_arrays),
    ):
        yield seen
