import pytest

from pagetier.handler.metrics import Histogram


def histogram(*values):
    made = Histogram((1.0, 2.0, 4.0))
    for value in values:
        made.observe(value)
    return made


def test_values_are_counted_below_their_bounds_inclusive():
    made = histogram(0.5, 1.0, 1.5, 4.0, 5.0)
    assert made.counts == [2, 1, 1, 1]
    assert made.count == 5
    assert made.sum == 12.0


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ((), 0.5, 0.0),
        ((0.5, 0.5), 0.5, 0.5),  # half of the first bucket's width
        ((3.0,), 1.0, 4.0),
        ((0.5, 1.5, 3.0, 3.0), 0.5, 2.0),
        ((9.0,), 0.5, 4.0),  # beyond the last bound
    ],
)
def test_quantiles_lie_within_their_bucket(values, share, expected):
    assert histogram(*values).quantile(share) == expected


def test_copy_stays_as_it_is():
    made = histogram(1.0)
    copied = made.copy()
    made.observe(1.0)
    assert (copied.count, copied.sum) == (1, 1.0)
