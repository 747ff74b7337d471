"""Models of time over m and n, memory, the page and README's figures.  Nothing here asserts a time."""

import json
import re

import numpy as np
import pytest

from bench import compare, fits, kept, memory, page, report, roofline, scaling
from bench.__main__ import PARTS, main

M, N = (grid.ravel().astype(float) for grid in np.meshgrid([2, 4, 8, 16, 32, 64, 128], [1 << 12, 1 << 16, 1 << 20]))
TRUE = np.array([2e-5, 1.2e-10, 1e-11])  # overtakes at m = 12


def points(model, factors, noise=0.0):
    seconds = model.seconds(np.asarray(factors), M, N)
    return np.array([M, N, seconds * np.exp(noise * np.random.default_rng(0).standard_normal(M.size))])


# -- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "factors"),
    [
        (fits.GRAM, TRUE),
        (fits.ADDITIVE, TRUE),
        (fits.COMBINE, [1e-5, 3e-10]),
        (fits.SPECTRUM, [3e-5, 4e-10]),
        (fits.WRITE, [2e-4, 6e-10, 8e-10]),
    ],
)
def test_factors_are_found_again(model, factors):
    np.testing.assert_allclose(
        model.fitted(*points(model, factors)), factors, rtol=1e-6
    )  # NNLS is exact but for rounding


def test_the_larger_term_alone_counts_and_the_model_says_so():
    assert str(fits.GRAM) == "a + max(b·mn, c·m²n)"
    assert str(fits.ADDITIVE) == "a + b·mn + c·m²n"
    for m, expected in ((4.0, 2e-5 + 1.2e-10 * 4e3), (40.0, 2e-5 + 1e-11 * 1600e3)):
        assert fits.GRAM.seconds(TRUE, np.array([m]), np.array([1e3]))[0] == pytest.approx(expected)


@pytest.mark.parametrize(("true", "other"), [(fits.GRAM, fits.ADDITIVE), (fits.ADDITIVE, fits.GRAM)])
def test_cross_validation_prefers_the_model_that_made_the_times(true, other):
    found = fits.described(true, other, points(true, TRUE, noise=0.02))
    assert found["left out"][str(true)] < found["left out"][str(other)]
    assert found["median error"] < 0.04  # twice the noise
    assert len(found["residuals"]) == found["points"] == M.size


def test_confidence_intervals_contain_the_truth_and_grow_with_the_noise():
    widths = []
    for noise in (0.01, 0.1):
        found = fits.described(fits.GRAM, fits.ADDITIVE, points(fits.GRAM, TRUE, noise))
        value, low, high = found["crossover"]
        assert low <= value <= high
        assert low <= 12 * (1 + noise)
        assert high >= 12 * (1 - noise)
        widths.append(high - low)
    assert widths[0] < widths[1]


def test_a_crossover_that_is_never_reached_has_no_number():
    found = fits.described(fits.GRAM, fits.ADDITIVE, points(fits.COMBINE, [1e-5, 3e-10]))
    assert found["crossover"][0] is None or found["crossover"][0] >= M.max()


# -- the sub-command ----------------------------------------------------------------------------------------


def test_the_grid_covers_what_it_says():
    every, quick = scaling.shapes(False), scaling.shapes(True)
    assert {shape.m for shape in every} >= {2, 512}
    lengths = {shape.n for shape in every if shape.sharded is None}
    assert (min(lengths), max(lengths)) == (1 << 12, 1 << 26)
    assert all(shape.n == shape.sharded // shape.m for shape in every if shape.sharded)
    assert {shape.m for shape in every if shape.write} == set(scaling.WRITES)
    assert not any(shape.write for shape in scaling.shapes(False, "cuda"))
    assert len(quick) < len(every)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a run over a few small shapes writes, and its folder; every shape in reach counts as beyond the cache."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("out")
    small = [scaling.Shape(m, n, write=m < 9) for m in (2, 3, 8, 17) for n in (2000, 9000)]
    small += [scaling.Shape(m, 9000 // m, sharded=9000) for m in (2, 3, 8, 17)]
    on = scaling.Side("cpu", "a machine", scaling.peers.workers, lambda: np.ones(4096).sum(), 4 * 4096, cache=1)
    patch.setattr(scaling, "shapes", lambda *_: small)
    patch.setattr(scaling, "CUBES", (2, 3, 8, 17, 30))
    patch.setattr(scaling, "side", lambda _: on)
    patch.setattr(scaling, "memory_held", lambda: [{"what": "sharded", "m": 2, "n": 10**6, "bytes": 12_100_000}])
    main(["scaling", "--rounds", "1", "--out", str(folder)])
    patch.undo()
    return json.loads((folder / "scaling.json").read_text()), folder


def test_parts_and_writes_are_measured_and_fitted(measured):
    found, _ = measured
    assert {tuple(sorted(row["seconds"])) for row in found["scaling"]} == {
        ("combine", "gram"),
        ("combine", "gram", "write"),
    }
    assert set(found["fits"]) == {
        "spectrum",
        "gram, beyond",
        "combine, beyond",
        "write, beyond",
    }
    assert found["fits"]["gram, beyond"]["points"] == 8  # not those of ranks


def test_the_answer_and_the_tables_have_the_figures_of_the_file(measured):
    found, folder = measured
    plain = (folder / "scaling.md").read_text()
    cubes = {row["m"]: row["seconds"]["spectrum"] for row in found["eigenproblem"]}
    for words in (
        "Per worker when sharded",
        "Per asynchronous Write",
        f"{1e9 * found['fits']['spectrum']['factors']['d·m³'][0]:.2g}",
    ):
        assert words in plain
    assert f"| {report.milliseconds(cubes[17])} |" in plain
    assert "| sharded | 2 | 1,000,000 | 8.0 | 12.1 | 12.0 | O(n): 3n |" in plain
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_where_no_shape_is_beyond_the_cache_the_crossover_is_said_to_be_within_it(measured):
    found, _ = measured
    within = found | {"fits": {name.replace("beyond", "in cache"): fit for name, fit in found["fits"].items()}}
    for one, expected in ((found, False), (within, True)):
        said = scaling.answer(one["fits"], one["scaling"], one["eigenproblem"]).paragraphs[0]
        assert ("within the cache" in said, "within the cache" in kept._scaling(one)) == (expected, expected)


@pytest.mark.parametrize(("off", "words"), [((0.1, 0.1), "yes: no m²n"), ((0.2, 0.1), "not as measured")])
def test_what_is_said_of_writes_follows_from_points_left_out(off, words):
    left_out = dict(zip(map(str, (fits.WRITE, fits.WRITE_OF_ALL)), off, strict=True))
    assert f"(in cache) {words}" in scaling._of_a_write({"left out": left_out}, "write, in cache")


@pytest.mark.parametrize("quick", [False, True])
def test_passes_within_the_cache_and_beyond_it_are_enough_to_be_fitted(monkeypatch, quick):
    monkeypatch.setattr(compare, "last_level_cache", lambda: 480 << 20)  # of a host
    monkeypatch.setattr(compare, "available_cores", lambda: 2)
    sizes = [roofline.gram(one.m, one.n, 4).bytes for one in scaling.shapes(quick) if one.sharded is None]
    for least, most in ((0, compare.own_cache()), (scaling.BEYOND * compare.own_cache(), np.inf)):
        assert sum(least <= size <= most for size in sizes) > len(fits.ADDITIVE.terms)


def test_without_a_device_the_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling.gpu, "available", lambda: False)
    with pytest.raises(SystemExit, match="CuPy"):
        main(["scaling", "--device", "cuda", "--out", str(tmp_path)])


def test_a_step_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(scaling.fn, "step", lambda thetas, grads, **_: (thetas[0], None))
    on = scaling.Side("cpu", "", scaling.peers.workers, lambda: None, 1, 1)
    with pytest.raises(ArithmeticError, match="the step is wrong"):
        scaling.measure(scaling.Shape(3, 1000), on, 1)


# -- the page -----------------------------------------------------------------------------------------------


def test_the_report_is_one_page_that_needs_nothing_else(measured, capsys):
    found, folder = measured
    main(["report", "--out", str(folder)])
    text = (folder / "report.html").read_text()
    assert str(folder / "report.html") in capsys.readouterr().out.replace("\n", "")
    links = re.findall(r'(?:src|href)="([^"]{1,40})', text)
    assert {link.partition(",")[0] for link in links} == {"data:image/png;base64", "#scaling"}
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert found["command"] in text
    for part in PARTS["scaling"](found, folder):
        assert part.title in text
    assert text.count("<table") == text.count('<div class="scroll"')
    assert "### Peak memory" in (folder / "report.md").read_text()


def test_a_page_shows_what_is_written_and_no_markup(tmp_path):
    part = report.Table("a < b", ("<i>",), [("x & y",)], "n < 1")
    machine = {"cpu": "<b>", "cores": 2, "system": "S", "python": "3"}
    page.write(tmp_path, "some", {"x": ({"command": "c", "machine": machine}, [part])})
    text = (tmp_path / "some.html").read_text()
    for shown in ("a &lt; b", "&lt;i&gt;", "x &amp; y", "n &lt; 1", "&lt;b&gt;"):
        assert shown in text


def test_without_results_the_report_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="python -m bench"):
        main(["report", "--out", str(tmp_path)])


# -- README -------------------------------------------------------------------------------------------------


def test_the_figures_of_the_readme_are_those_of_the_files():
    text = kept.README.read_text(encoding="utf-8")
    assert text.count(kept.block()) == 1


def test_results_are_kept_by_machine_and_shown(tmp_path, monkeypatch, measured):
    found, folder = measured
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(kept, "README", tmp_path / "README.md")
    kept.README.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md must have a line"):
        main(["report", "--readme", "--out", str(folder)])
    kept.README.write_text(f"before\n{kept.BEGIN}\nold\n{kept.END}\nafter\n")
    main(["report", "--readme", "--out", str(folder)])
    (copy,) = tmp_path.glob("results/*/scaling.json")
    assert json.loads(copy.read_text()) == found
    assert re.fullmatch(r"[a-z0-9-]+-\d+-cores", copy.parent.name)
    text = kept.README.read_text()
    assert text == f"before\n{kept.block()}\nafter\n"
    assert "old" not in text
    assert found["command"] in text


# -- memory -------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not memory.RESET.exists(), reason="this system does not tell")


@needs_proc
def test_a_peak_is_seen_after_it_is_gone():
    taken = memory.peak_growth(lambda: np.ones(1 << 24).sum())
    assert taken == pytest.approx(8 << 24, rel=0.05)  # beside what NumPy itself allocates


@needs_proc
@pytest.mark.parametrize("last", [6_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_a_process_does_not_grow_with_its_steps(run_python, last):
    program = f"from bench import memory; print(memory.growth_over_steps(1_000, {last}))"
    assert int(run_python("-c", program, env={"PYTHONPATH": str(report.ROOT)})) < 8 << 20


@needs_proc
@pytest.mark.parametrize(
    ("m", "total"),
    [(8, 1 << 22), (64, 1 << 22), *(pytest.param(m, 1 << 26, marks=pytest.mark.full) for m in (2, 8, 64, 512))],
)
def test_a_step_holds_the_callers_arrays_and_m2_log_n(run_python, m, total):
    n = total // m
    program = f"from bench import memory; print(memory.peak_of_step({m}, {n}))"
    found = int(run_python("-c", program, env={"PYTHONPATH": str(report.ROOT)}))
    # Twice m² log₂ n float64, and 2 MiB for stacks of threads and pages of code that are read for the first time.
    assert found < 16 * m * m * np.log2(n) + (2 << 20)
