"""The intervals agree with published ones and with what defines them."""

from __future__ import annotations

import math

import pytest

from raytroupe.deploy.evaluation.intervals import (
    Z_95,
    paired_difference,
    quantile,
    ratio_of_sums,
    student,
    wilson,
)


@pytest.mark.parametrize(("right", "items"), [(0, 38), (38, 38), (33, 38), (592, 608), (1, 1)])
def test_wilson_bounds_lie_z_standard_errors_from_the_share(right: int, items: int) -> None:
    """With the standard error at the bound itself."""
    low, high = wilson(right, items)
    assert low <= right / items <= high
    for bound in (low, high):
        standard_error = math.sqrt(bound * (1 - bound) / items)
        assert abs(right / items - bound) == pytest.approx(Z_95 * standard_error, abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "gained", "items", "low", "high"),
    [
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8: Bentur et al. 2009
        # and Cavo et al. 2012, Tango's asymptotic score interval.
        (1, 7, 21, -0.517, -0.026),
        (6, 16, 161, -0.124, -0.005),
    ],
)
def test_paired_difference_is_as_published(lost: int, gained: int, items: int, low: float, high: float) -> None:
    assert paired_difference(lost, gained, items) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize(("lost", "gained"), [(5, 1), (6, 1), (10, 3), (9, 3), (20, 9), (2, 14)])
def test_paired_difference_excludes_zero_where_mcnemars_test_rejects(lost: int, gained: int) -> None:
    low, high = paired_difference(lost, gained, 200)
    assert (low > 0 or high < 0) == (abs(lost - gained) / math.sqrt(lost + gained) > Z_95)


def test_paired_difference_without_any_change_is_wilsons_bound() -> None:
    """No event among n: both bounds are those of a share of 0, in either direction."""
    low, high = paired_difference(0, 0, 400)
    assert high == pytest.approx(wilson(0, 400)[1])
    assert low == pytest.approx(-high)


def test_paired_difference_of_everything() -> None:
    assert paired_difference(10, 0, 10)[1] == 1
    assert paired_difference(0, 10, 10)[0] == -1


def test_ratio_with_equal_denominators_is_students_interval() -> None:
    """Student's own sleep data, differences of the two drugs: R's t.test gives 0.7001142 to 2.4598858."""
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert ratio_of_sums(differences, [1] * 10) == pytest.approx((0.7001, 2.4599), abs=2e-3)


def test_ratio_does_not_depend_on_the_scale_of_denominators() -> None:
    once, thrice = (ratio_of_sums([1.0, 2.0, 4.0], [x * 2.0, x * 3.0, x * 4.0]) for x in (1, 3))
    assert once == pytest.approx((3 * thrice[0], 3 * thrice[1]))


@pytest.mark.parametrize(
    ("tail", "freedom", "expected"), [(0.025, 10, 2.2281), (0.025, 30, 2.0423), (0.005, 30, 2.7500), (0.025, 1e9, 1.96)]
)
def test_student_is_as_in_the_tables(tail: float, freedom: int, expected: float) -> None:
    assert student(quantile(tail), freedom) == pytest.approx(expected, rel=1e-3)
