"""Figures hold the numbers that they are given, read from matplotlib's artists, and stay small whatever they are given."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_hex

from orchestrator import figures
from orchestrator.figures import COLOURS, GREY


def named(axes, label):
    """The line of a name in the legend."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def names(axes):
    """What stands down the side of a figure, from the top."""
    return [label.get_text() for label in axes.get_yticklabels()]


def bars(axes):
    """The widths of horizontal bars, from the first name on."""
    return [bar.get_width() for bar in axes.patches]


def spans(axes):
    """Start and end of each job of a timeline, by kind."""
    found = {}
    for patch in axes.patches:
        corners = patch.get_path().vertices.reshape(-1, 5, 2)  # four, and the one that closes
        found[patch.get_label()] = [(corner[:4, 0].min(), corner[:4, 0].max()) for corner in corners]
    return found


def test_figures_leave_no_trace_and_hold_what_they_are_given():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn = figures.over_tasks({"a": [[0.1, None, 0.3], [0.3, None, 0.5]], "b": [[0.5, 0.4, 0.3]]}, "mean IoU")
    line = named(drawn.axes[0], "a")
    assert line.get_xdata().tolist() == [1, 3]
    assert line.get_ydata().tolist() == pytest.approx([0.2, 0.4])
    (band,) = drawn.axes[0].collections  # of the entry with two seeds alone
    assert band.get_datalim(drawn.axes[0].transData).intervaly == pytest.approx([0.2 - 0.02**0.5, 0.4 + 0.02**0.5])
    assert figures.png(drawn).startswith(b"\x89PNG")
    text = figures.svg(drawn, "one")
    assert "currentColor" in text
    assert "var(--line)" in text
    assert dict(matplotlib.rcParams) == before


def test_a_figures_ids_are_its_own():
    drawn = figures.dots({"a": [0.5]}, "forgetting")
    one, two = (figures.svg(drawn, name) for name in ("one", "two"))
    ids = [re.findall(r'\bid="([^"]+)"', text) for text in (one, two)]
    assert len(ids[0]) == len(set(ids[0])) > 5
    assert not set(ids[0]) & set(ids[1])
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', one))
    assert used
    assert used <= set(ids[0])


def test_entries_beyond_the_sixth_are_grey():
    drawn = figures.over_tasks({f"entry {number}": [[0.1 * number] * 2] for number in range(8)}, "mean IoU")
    shown = [line.get_color() for line in drawn.axes[0].lines]
    assert shown == [GREY, GREY, *COLOURS[:6]]
    assert named(drawn.axes[0], "2 others").get_ydata().tolist() == pytest.approx([0.6, 0.6])


def test_dots_are_the_seeds_and_their_mean():
    axes = figures.dots({"a": [0.1, 0.3], "b": [-0.2]}, "forgetting").axes[0]
    _, *lines = axes.lines  # the first is 0
    assert [list(line.get_xdata()) for line in lines] == [[0.1, 0.3], [pytest.approx(0.2)], [-0.2], [-0.2]]
    assert [list(line.get_ydata()) for line in lines] == [[0, 0], [0], [1], [1]]
    assert names(axes) == ["a", "b"]


def test_a_difference_whose_interval_holds_0_is_grey():
    axes = figures.differences({"a": (0.2, 0.1, 0.3), "b": (0.0, -0.1, 0.1), "c": (-0.2, -0.3, -0.1)}, "to cmr").axes[0]
    shown = [(list(line.get_xdata()), line.get_color()) for line in axes.lines[:6]]
    assert shown == [
        ([0.1, 0.3], COLOURS[0]), ([0.2], COLOURS[0]), ([-0.1, 0.1], GREY), ([0.0], GREY),
        ([-0.3, -0.1], COLOURS[0]), ([-0.2], COLOURS[0]),
    ]  # fmt: skip
    assert names(axes) == ["a", "b", "c"]


def test_a_matrix_shows_every_value_and_leaves_out_what_is_none():
    axes = figures.matrix(
        [[0.5, None], [0.25, 1.0]], ["after 1", "after 2"], ["task 1", "task 2"], "mean IoU", groups=[1]
    ).axes[0]
    (picture,) = axes.images
    np.testing.assert_array_equal(picture.get_array().filled(np.nan), [[0.5, np.nan], [0.25, 1.0]])
    assert picture.get_clim() == (0.0, 1.0)
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.25", "1.00"]
    assert names(axes) == ["after 1", "after 2"]
    assert [line.get_ydata() for line in axes.lines] == [[0.5, 0.5]]
    (dim,) = figures.matrix([[0.5, 0.2]], ["a"], ["1", "2"], "IoU", brightest=0.2).axes[0].images
    assert dim.get_clim() == (0.0, 0.2)


def test_collisions_have_a_bar_per_class_in_each_panel():
    columns = {"videos\nF": [3.0, 1.0], "F'": [0.75, 0.25]}
    panels = figures.collisions(["bell", "dog"], columns, [0.1, None], "confused\nafter").axes
    assert [axes.get_title() for axes in panels] == [*columns, "confused\nafter"]
    assert [bars(axes) for axes in panels] == [[3.0, 1.0], [0.75, 0.25], [0.1, pytest.approx(np.nan, nan_ok=True)]]
    assert names(panels[0]) == ["bell", "dog"]


def test_deltas_count_all_candidates_and_the_kept_ones():
    axes = figures.deltas([-0.5, 0.0, 0.01, 0.4, 0.5], [0.0, 0.01], "delta").axes[0]
    every, kept = axes.containers
    assert [sum(bar.get_height() for bar in group) for group in (every, kept)] == [5, 2]
    (bar,) = [bar for bar in kept if bar.get_height()]
    assert bar.get_x() <= 0.0 < 0.01 < bar.get_x() + bar.get_width()


@pytest.mark.parametrize(("best_is", "best"), [("max", [0.2, 0.5, 0.5]), ("min", [0.2, 0.2, 0.1])])
def test_a_history_has_the_best_so_far_and_who_did_not_end_well(best_is, best):
    states = {1: "FINISHED", 2: "FINISHED", 3: "FAILED", 4: "FINISHED", 5: "PRUNED"}
    axes = figures.history({4: 0.1, 1: 0.2, 2: 0.5}, states, best_is, "val/miou/all").axes[0]
    assert named(axes, "best so far").get_xdata().tolist() == [1, 2, 4]
    assert named(axes, "best so far").get_ydata().tolist() == best
    assert list(named(axes, "trial").get_ydata()) == [0.2, 0.5, 0.1]
    assert list(named(axes, "failed, pruned or stopped").get_xdata()) == [3, 5]


def test_importance_has_a_bar_per_knob():
    axes = figures.importance({"method.ratio": 0.75, "schedule.epochs": 0.25}).axes[0]
    assert bars(axes) == [0.75, 0.25]
    assert names(axes) == ["ratio", "epochs"]
    assert [text.get_text() for text in axes.texts] == [" 0.75", " 0.25"]


def test_a_slice_has_a_dot_per_trial_and_the_best():
    axes = figures.knob_slice("method.ratio", [0.1, 0.01, 0.001], [0.3, 0.5, 0.4], 1, "val/miou/all", True).axes[0]
    (dots,) = axes.collections
    np.testing.assert_array_equal(dots.get_offsets(), [[0.1, 0.3], [0.01, 0.5], [0.001, 0.4]])
    darkness = dots.get_facecolors()[:, :3].sum(1)
    assert darkness[0] > darkness[1] > darkness[2]  # darker dots are later trials
    (best,) = axes.lines
    assert (best.get_xdata(), best.get_ydata()) == ([0.01], [0.5])
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "ratio"
    named_places = figures.knob_slice("method.base", ["plop", "lwf", "plop"], [1.0, 2.0, 3.0], 2, "m", False).axes[0]
    assert [label.get_text() for label in named_places.get_xticklabels()] == ["lwf", "plop"]
    assert named_places.collections[0].get_offsets()[:, 0].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("best_is", "best", "order"), [("max", 1, [0, 2, 1]), ("min", 0, [1, 2, 0])])
def test_parallel_coordinates_have_a_line_per_trial_the_better_the_brighter(best_is, best, order):
    knobs, values = {"a.count": [1, 3, 2], "a.base": ["x", "y", "x"]}, [0.0, 1.0, 0.5]
    axes = figures.parallel(knobs, values, best, best_is, "val/miou/all").axes[0]
    (lines,) = axes.collections
    expected = [[[0, 0], [1, 0], [2, 0]], [[0, 1], [1, 1], [2, 1]], [[0, 0.5], [1, 0], [2, 0.5]]]
    np.testing.assert_array_equal(list(lines.get_segments()), [expected[trial] for trial in order])
    brightness = lines.get_colors()[:, :3].sum(1)
    assert brightness[0] < brightness[1] < brightness[2]
    (line,) = [line for line in axes.lines if line.get_color() == COLOURS[1]]
    assert line.get_ydata().tolist() == [place[1] for place in expected[best]]
    assert [text.get_text() for text in axes.texts] == ["1", "3", "x", "y", "0", "1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["count", "base", "val/miou/all"]


def test_a_scatter_marks_what_it_is_told_to():
    x, y, marked = [0.2, 0.4, 0.3], [1.0, 2.0, 3.0], [True, False, True]
    axes = figures.scatter(x, y, marked, "val/miou/new", "val/miou/all", ("Pareto front", "other trials")).axes[0]
    front, others = named(axes, "Pareto front"), named(axes, "other trials")
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([0.2, 0.3], [1.0, 3.0])
    assert (list(others.get_xdata()), list(others.get_ydata())) == ([0.4], [2.0])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("val/miou/new", "val/miou/all")
    assert axes.xaxis.get_major_formatter()(0.2) != "200m"
    many = figures.scatter([2e6, 1e6], y[:2], marked[:2], "memory/bytes", "val/miou/all", ("best", "other trials")).axes[0]
    assert many.xaxis.get_major_formatter()(2e6) == "2M"


def test_a_timeline_has_every_job_in_as_few_lanes_as_hold_them():
    jobs = [(0.0, 4.0, "training", "1"), (1.0, 2.0, "scoring", "2"), (2.0, 3.0, "scoring", "2")]
    axes = figures.timeline(jobs).axes[0]
    assert names(axes) == ["1", "2"]
    assert spans(axes) == {"training": [(0.0, 4.0)], "scoring": [(1.0, 2.0), (2.0, 3.0)]}
    assert {patch.get_label(): to_hex(patch.get_facecolor()).upper() for patch in axes.patches} == {
        "scoring": COLOURS[0],
        "training": COLOURS[1],
    }
    assert [(text.get_text(), *text.get_position()) for text in axes.texts] == [("1", 2.0, 1), ("2", 1.5, 2), ("2", 2.5, 2)]
    paused = figures.timeline([(0.0, 4.0, "training", "1"), (1000.0, 1006.0, "training", "2")]).axes[0]
    assert spans(paused) == {"training": [(0.0, 4.0), (5.0, 11.0)]}  # a pause is no longer than a tenth of the work


def test_stacked_parts_of_a_few_trials_are_bars_with_names():
    drawn = figures.stacked([1, 2], {"computed": [3.0, 1.0], "reused": [0.5, 2.0]}, "worker-seconds")
    computed, reused = drawn.axes[0].containers
    assert [(bar.get_x(), bar.get_width()) for bar in computed] == [(0.0, 3.0), (0.0, 1.0)]
    assert [(bar.get_x(), bar.get_width()) for bar in reused] == [(3.0, 0.5), (1.0, 2.0)]
    assert names(drawn.axes[0]) == ["trial 1", "trial 2"]


def test_stacked_parts_of_many_trials_are_areas_over_their_numbers():
    trials = [number for number in range(1, 52) if number != 3]
    parts = {"computed": [float(number) for number in trials], "reused": [1.0] * len(trials)}
    drawn = figures.stacked(trials, parts, "worker-seconds")
    computed, reused = (area.get_data() for area in drawn.axes[0].patches)
    assert computed.edges[[0, -1]].tolist() == [0.5, 51.5]
    assert computed.values[:4].tolist() == [1.0, 2.0, 0.0, 4.0]
    assert (reused.values - reused.baseline).tolist() == [float(number != 3) for number in range(1, 52)]
    assert reused.baseline.tolist() == computed.values.tolist()


def test_figures_of_a_thousand_trials_are_as_large_as_those_of_ten():
    rng = np.random.default_rng(0)
    places, values = {"a.one": rng.random(1000).tolist(), "a.two": rng.random(1000).tolist()}, rng.random(1000).tolist()
    ends = np.cumsum(rng.random((64, 50)), axis=1)  # 64 jobs at once
    jobs = [(max(float(end) - 0.9, 0.0), float(end), ("training", "scoring")[n % 2], str(n)) for n, end in enumerate(ends.flat)]
    for drawn in (
        figures.history(dict(enumerate(values)), {}, "max", "m"),
        figures.knob_slice("a.one", places["a.one"], values, 0, "m", False),
        figures.parallel(places, values, 0, "max", "m"),
        figures.scatter(places["a.one"], values, [value > 0.9 for value in values], "x", "m", ("front", "others")),
        figures.stacked(list(range(1000)), {"computed": values, "reused": values}, "s"),
        figures.timeline(jobs),
    ):
        assert drawn.get_size_inches()[1] < 8
        assert len(drawn.axes[0].get_children()) < 60  # thousands of artists take a minute
        assert len(figures.svg(drawn, "one")) < 2**19
