"""Working memory that is kept between calls."""

import threading

import numpy as np
import pytest

import fastnewton as fn
from fastnewton.kernels.cpu import workspace as memory


@pytest.fixture(autouse=True)
def nothing_kept():
    fn.clear_caches()
    yield
    fn.clear_caches()


def test_room_is_used_again_by_what_fits():
    first = memory.borrowed(1000)
    memory.returned(first)
    assert np.shares_memory(memory.borrowed(500), first)


def test_a_call_within_a_call_has_room_of_its_own():
    first = memory.borrowed(1000)
    memory.returned(first)
    outer, inner = memory.borrowed(1000), memory.borrowed(1000)
    assert not np.shares_memory(outer, inner)


def test_only_one_room_is_kept_and_none_of_the_largest():
    small, other = memory.borrowed(10), memory.borrowed(10)
    memory.returned(memory.borrowed(memory.KEPT_BYTES // 8 + 1))
    assert not memory._kept
    memory.returned(small)
    memory.returned(other)
    assert [room is small for room in memory._kept] == [True]


def test_clear_caches_gives_it_back():
    memory.returned(memory.borrowed(1000))
    fn.clear_caches()
    assert not memory._kept


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("fill", [np.nan, 1e300])
def test_what_an_earlier_call_has_left_changes_nothing(rng, m, fill):
    thetas, grads = rng.standard_normal((2, m, 5000))
    fresh, _ = fn.step(thetas, grads, lr=0.5)
    guarded, _ = fn.step(thetas, grads, lr=0.5, safeguards=fn.Safeguards())
    for options, wanted in (({}, fresh), ({"safeguards": fn.Safeguards()}, guarded)):
        memory._kept[:] = [np.full(1 << 20, fill)]
        np.testing.assert_array_equal(fn.step(thetas, grads, lr=0.5, **options)[0], wanted)


def test_threads_that_step_at_once(rng):
    arrays = [rng.standard_normal((2, m, 3000)) for m in (5, 20, 40)]
    wanted = [fn.step(*given, lr=0.5)[0] for given in arrays]
    wrong = []

    def steps(given, right):
        for _ in range(50):
            if not np.array_equal(fn.step(*given, lr=0.5)[0], right):
                wrong.append(len(given[0]))

    threads = [threading.Thread(target=steps, args=pair) for pair in zip(arrays, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
