"""Which layers are streamed, and through how many slots."""

from hypothesis import given
from hypothesis import strategies as st

from pagetier.offload.weight_plan import plan_weights, spread

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=40)


def test_what_is_streamed_frees_all_but_two_slots() -> None:
    plan = plan_weights([10] * 32, 100)
    assert (len(plan.layers), plan.num_slots) == (12, 2)
    assert (plan.streamed_bytes, plan.freed_bytes) == (120, 100)
    assert len(plan_weights([10] * 32, 101).layers) == 14  # two more: their number is even


def test_nothing_is_streamed_if_nothing_is_wanted_or_gained() -> None:
    for plan in (plan_weights([10] * 32, 0), plan_weights([10] * 3, 5)):
        assert plan.layers == ()
        assert plan.streamed_bytes == plan.freed_bytes == plan.num_slots == 0


def test_as_much_as_possible_is_streamed_if_that_is_still_too_little() -> None:
    assert plan_weights([10] * 8, 1000).layers == tuple(range(8))
    assert plan_weights([10] * 9, 1000).freed_bytes == 60


@given(SIZES, st.integers(1, 4000))
def test_no_smaller_number_of_layers_frees_as_much(sizes: list[int], wanted: int) -> None:
    plan = plan_weights(sizes, wanted)
    assert list(plan.layers) == sorted(set(plan.layers))
    assert len(plan.layers) % 2 == 0
    assert plan.streamed_bytes == sum(sizes[layer] for layer in plan.layers)
    target = min(wanted, plan.freed_bytes)
    for fewer in range(2, len(plan.layers), 2):
        assert spread(sizes, fewer).freed_bytes < target


@given(st.integers(2, 40), st.integers(0, 40))
def test_streamed_layers_are_evenly_spread(count: int, resident: int) -> None:
    layers = spread([1] * (count + resident), count).layers
    gaps = {b - a for a, b in zip(layers, (*layers[1:], layers[0] + count + resident), strict=True)}
    assert max(gaps) - min(gaps) <= 1
