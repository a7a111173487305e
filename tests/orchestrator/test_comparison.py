"""The numbers of a comparison: differences paired by seed, seeds that failed, the answer that needs no network."""

import csv
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from orchestrator.comparison import (
    BACKGROUND_ALONE,
    StreamResult,
    background_alone,
    markdown,
    paired_difference,
    raw_csv,
    table,
    table_csv,
)


def result(entry, seed, value, setting="2-2", error=""):
    values = {} if error else {"val/miou/all": value, "worker_seconds": 10.0, "memory_bytes": 2.0**20}
    return StreamResult(entry, setting, seed, values, error)


RESULTS = [
    *(result("a", seed, value) for seed, value in enumerate((0.5, 0.7, 0.6))),
    *(result("b", seed, value) for seed, value in enumerate((0.4, 0.5, 0.6))),
]


def test_the_interval_of_a_difference_is_that_of_all_resamples():
    ours, theirs = [0.5, 0.7, 0.65], [0.4, 0.5, 0.6]
    differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    means = sorted(sum(pick) / 3 for pick in itertools.product(differences, repeat=3))
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(sum(differences) / 3)
    assert found.low == pytest.approx(np.quantile(means, 0.025))
    assert found.high == pytest.approx(np.quantile(means, 0.975))
    assert found.low < found.mean < found.high


def test_many_seeds_are_resampled_and_the_interval_covers_about_two_standard_errors():
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(0.1, 1.0, 100), np.zeros(100)
    found = paired_difference(list(ours), list(theirs))
    error = ours.std() / 10
    assert found.low == pytest.approx(ours.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(ours.mean() + 1.96 * error, abs=0.3 * error)
    assert found == paired_difference(list(ours), list(theirs))  # nothing is drawn anew


@pytest.mark.parametrize(("ours", "theirs"), [([0.1], [0.1, 0.2]), ([], [])])
def test_values_that_are_no_pairs_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="reference"):
        paired_difference(ours, theirs)


def test_a_row_has_mean_spread_and_the_paired_difference():
    first, second = table(RESULTS, (0, 1, 2), reference="b")
    assert (first.entry, second.entry) == ("a", "b")
    assert first.mean["val/miou/all"] == pytest.approx(0.6)
    assert first.std["val/miou/all"] == pytest.approx(0.1)
    assert first.difference["val/miou/all"] == paired_difference([0.5, 0.7, 0.6], [0.4, 0.5, 0.6])
    assert not second.difference


def test_one_seed_has_no_spread_and_its_difference_no_interval():
    row, reference = table([result("a", 0, 0.5), result("b", 0, 0.25)], (0,), reference="b")
    assert row.mean["val/miou/all"] == 0.5
    assert not row.std
    assert row.difference["val/miou/all"].mean == 0.25
    text = markdown([row, reference], "val", "b")
    assert "| +0.250 |" in text
    assert "val/miou/all/difference" in table_csv([row, reference])
    assert "val/miou/all/low" not in table_csv([row, reference])


@pytest.mark.parametrize("broken", [result("a", 2, 0, error="DivergedError: loss is not finite"), None])
def test_a_failed_or_missing_seed_is_not_averaged_away(broken):
    results = [each for each in RESULTS if (each.entry, each.seed) != ("a", 2)] + ([broken] if broken else [])
    rows = {row.entry: row for row in table(results, (0, 1, 2), reference="a")}
    assert rows["a"].failed == "seeds 2 failed"
    assert not rows["a"].mean
    assert rows["b"].mean["val/miou/all"] == pytest.approx(0.5)
    assert not rows["b"].difference  # two of three pairs are not the comparison that was asked for
    assert "seeds 2 failed" in markdown(list(rows.values()), "val", "a")


def test_settings_are_compared_with_themselves():
    results = (
        RESULTS + [result("a", seed, 0.1, "3-1") for seed in range(3)] + [result("b", seed, 0.2, "3-1") for seed in range(3)]
    )
    rows = table(results, (0, 1, 2), reference="b")
    assert [(row.setting, row.entry) for row in rows] == [("2-2", "a"), ("2-2", "b"), ("3-1", "a"), ("3-1", "b")]
    assert rows[2].difference["val/miou/all"].mean == pytest.approx(-0.1)
    text = markdown(rows, "val", "b")
    assert text.index("**2-2**") < text.index("| a | 0.600 ± 0.100") < text.index("**3-1**") < text.index("| b | 0.200")


def test_the_csv_files_hold_every_number_unrounded():
    results = [result("a", 0, 0.1 + 0.2), result("a", 1, 1 / 3)]
    raw = list(csv.DictReader(io.StringIO(raw_csv(results))))
    assert [float(line["val/miou/all"]) for line in raw] == [0.1 + 0.2, 1 / 3]
    assert [line["seed"] for line in raw] == ["0", "1"]
    (line,) = csv.DictReader(io.StringIO(table_csv(table(results, (0, 1)))))
    assert float(line["val/miou/all"]) == (0.1 + 0.2 + 1 / 3) / 2
    assert float(line["val/miou/all/std"]) == pytest.approx(np.std([0.3, 1 / 3], ddof=1))


def test_background_alone_is_the_closed_form():
    counts = np.array([[60, 5, 0], [10, 10, 0], [5, 0, 10]])
    found = background_alone(SimpleNamespace(counts={"val": counts}, num_base=2))
    assert found["val/miou/all"] == pytest.approx((65 / 100 + 0 + 0) / 3)
    assert found["val/miou/old"] == pytest.approx((65 / 100) / 2)
    assert found["val/miou/new"] == 0
    assert BACKGROUND_ALONE not in found
