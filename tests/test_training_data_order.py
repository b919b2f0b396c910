"""The order of visits: epochs of permutations, steps of one shape, and no state."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ether_diffusion.training.sample_plan import SampleOrder


def visits(order: SampleOrder, epoch: int) -> list[int]:
    start = epoch * order.num_samples
    return [order.photo(visit) for visit in range(start, start + order.num_samples)]


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_uses_each_item_as_often_as_it_is_repeated(
    num_items: int, batch: int, repeats: int, epoch: int
) -> None:
    order = SampleOrder(num_items, batch, seed=1, repeats=repeats)
    assert Counter(visits(order, epoch)) == dict.fromkeys(range(num_items), repeats)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 3))
def test_each_step_of_an_epoch_of_buckets_is_of_one_bucket(
    buckets: list[int], batch: int, repeats: int
) -> None:
    order = SampleOrder(len(buckets), batch, seed=1, buckets=buckets, repeats=repeats)
    for epoch in (0, 1):
        found = visits(order, epoch)
        steps = [found[start : start + batch] for start in range(0, len(found), batch)]
        assert all(len({buckets[item] for item in step}) == 1 for step in steps)
        assert all(len(step) == batch for step in steps)
        counts = Counter(found)
        assert all(counts[item] >= repeats for item in range(len(buckets)))
        sizes = Counter(buckets)
        for item, bucket in enumerate(buckets):
            # a bucket's visits are the samples, and what fills up its last chunk, as evenly as may be
            total = -(-sizes[bucket] * repeats // batch) * batch
            fill = total - sizes[bucket] * repeats
            assert counts[item] <= repeats + repeats * -(-fill // (sizes[bucket] * repeats))


@given(st.lists(st.integers(0, 200), max_size=20))
def test_an_item_depends_on_nothing_that_was_asked_before(asked: list[int]) -> None:
    order = SampleOrder(7, 3, seed=5, buckets=[0, 1, 0, 1, 1, 0, 2])
    for visit in asked:
        assert order.photo(visit) == SampleOrder(7, 3, seed=5, buckets=[0, 1, 0, 1, 1, 0, 2]).photo(visit)


@pytest.mark.parametrize("buckets", [None, [0] * 10 + [1] * 10])
def test_epochs_and_seeds_differ_in_order(buckets: list[int] | None) -> None:
    order = SampleOrder(20, 2, seed=0, buckets=buckets)
    other = SampleOrder(20, 2, seed=1, buckets=buckets)
    assert visits(order, 0) != visits(order, 1)
    assert visits(order, 0) != visits(other, 0)
    assert visits(order, 0) != sorted(visits(order, 0))


def test_without_buckets_the_order_does_not_depend_on_the_batch() -> None:
    orders = [SampleOrder(9, batch, seed=3) for batch in (1, 4)]
    assert visits(orders[0], 2) == visits(orders[1], 2)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 5),
    st.sampled_from([None, [0, 1, 0, 0, 1, 2, 2]]),
)
def test_a_step_uses_the_same_items_however_it_is_split(
    batch: int, accumulation: int, processes: int, step: int, buckets: list[int] | None
) -> None:
    num_visits = batch * accumulation * processes
    order = SampleOrder(7, num_visits, seed=3, buckets=buckets)
    split = [
        [order.photo(step * num_visits + (m * processes + p) * batch + place) for place in range(batch)]
        for p in range(processes)
        for m in range(accumulation)
    ]
    whole = [order.photo(visit) for visit in range(step * num_visits, (step + 1) * num_visits)]
    assert Counter(item for part in split for item in part) == Counter(whole)
    if buckets is not None:
        assert len({buckets[item] for item in whole}) == 1
