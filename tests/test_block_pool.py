"""One tier's book-keeping, with exact block ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagetier.handler.block_pool import BlockPool


def test_allocate_hands_out_in_queue_order_and_none_when_short():
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) is None
    assert pool.num_free == 1  # the refused request took nothing
    assert pool.allocate(1) == [3]
    pool.check()


def test_release_puts_blocks_without_hash_in_front_and_cached_ones_last():
    pool = BlockPool(4)
    a = pool.allocate(4)
    pool.publish(a[0], b"h0")
    pool.publish(a[1], b"h1")
    pool.release([2, 1, 0, 3])
    # 3 was released last and has no hash, so it is next; of the cached ones 1 was released first.
    assert list(pool.eviction_order()) == [3, 2, 1, 0]
    pool.check()


def test_lookup_revives_a_cached_block_and_allocate_forgets_it():
    pool = BlockPool(2)
    (block, _) = pool.allocate(2)
    pool.publish(block, b"h")
    pool.release([1, block])
    assert pool.lookup(b"h") == block
    pool.share([block])
    assert pool.num_free == 1
    assert pool.num_references(block) == 1
    pool.release([block])
    assert pool.allocate(2) == [1, block]
    assert pool.lookup(b"h") is None
    pool.check()


def test_shared_block_is_free_only_after_its_last_release():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_block_being_copied_is_quarantined_until_the_copy_ends():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.begin_copy(block)
    pool.release([block])
    assert pool.num_free == 0
    assert pool.num_draining == 1
    assert pool.allocate(1) is None
    pool.check()
    pool.end_copy(block)
    assert pool.num_draining == 0
    assert pool.allocate(1) == [block]


def test_quarantined_block_can_be_revived():
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"h")
    pool.begin_copy(block)
    pool.release([block])
    pool.share([block])
    assert pool.num_draining == 0
    pool.end_copy(block)
    assert pool.num_free == 0
    pool.check()


def test_end_copy_evict_first_makes_a_clean_block_the_next_to_go():
    pool = BlockPool(3)
    a = pool.allocate(3)
    for block in a:
        pool.publish(block, bytes([block]))
    pool.release(a)
    pool.begin_copy(2)
    pool.end_copy(2, evict_first=True)
    assert list(pool.eviction_order()) == [2, 0, 1]


def test_second_block_of_the_same_content_stays_unpublished():
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    assert pool.publish(a, b"h")
    assert not pool.publish(b, b"h")
    assert pool.lookup(b"h") == a
    pool.check()


def test_releasing_a_free_block_asserts():
    with pytest.raises(AssertionError):
        BlockPool(1).release([0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), max_size=60))
def test_books_balance_after_any_history(actions):
    pool = BlockPool(8)
    tables: list[int] = []
    copies: list[int] = []
    for action, k in actions:
        if action == 0:
            tables += pool.allocate(k % 4) or []
        elif action == 1 and tables:
            pool.release([tables.pop(k % len(tables))])
        elif action == 2 and tables:
            block = tables[k % len(tables)]
            pool.share([block])
            tables.append(block)
        elif action == 3 and tables:
            block = tables[k % len(tables)]
            if pool.hash_of(block) is None:
                pool.publish(block, bytes([k]))
        elif action == 4:
            pool.begin_copy(k)
            copies.append(k)
        elif action == 5 and copies:
            pool.end_copy(copies.pop(k % len(copies)), evict_first=bool(k % 2))
        elif action == 6:
            pool.unpublish(k)
        pool.check()
        for block in range(8):
            assert pool.num_references(block) == tables.count(block)
            assert pool.is_copying(block) == (block in copies)
        order = list(pool.eviction_order())
        assert len(order) == pool.num_free
    pool.release(tables)
    for block in copies:
        pool.end_copy(block)
    assert pool.num_free == 8
