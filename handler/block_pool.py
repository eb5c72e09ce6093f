"""The blocks of one tier: who refers to them, what they hold, and which goes next.

Owns reference counts, content hashes, counts of copies in flight, and the free queue, which is
also the eviction order. Both tiers use it. Knows nothing of tensors, sequences, or what a hash
means.

States, derived from three facts (references, copies in flight, hash)::

    references  copies  hash     GPU tier               CPU tier
    0           0       no       free                   free
    0           0       yes      cached                 valid, evictable
    0           > 0     any      quarantined            writing / reading
    > 0         0       any      active                 held for a swapped-out sequence
    > 0         > 0     any      loading / copied out   writing / reading

The free queue holds exactly the blocks without references and without copies: those without a
hash in front, then cached ones, least recently released first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class BlockPool:
    """``num_blocks`` blocks with ids ``0 .. num_blocks - 1``, all free at first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._num_copies = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_ids: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))
        self._num_draining = 0

    # --- questions: these change nothing ---

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now: free ones and cached ones."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that have a hash, referenced or not."""
        return len(self._block_ids)

    @property
    def num_draining(self) -> int:
        """Unreferenced blocks that become free once their copies have ended."""
        return self._num_draining

    @property
    def num_referenced(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free) - self._num_draining

    def lookup(self, block_hash: bytes) -> int | None:
        """The block that holds this content, if any."""
        return self._block_ids.get(block_hash)

    def hash_of(self, block_id: int) -> bytes | None:
        """The content hash of a block, if it has one."""
        return self._hashes[block_id]

    def num_references(self, block_id: int) -> int:
        """How many tables hold the block."""
        return self._num_references[block_id]

    def is_copying(self, block_id: int) -> bool:
        """Whether a copy into or out of the block is in flight."""
        return self._num_copies[block_id] > 0

    def is_free(self, block_id: int) -> bool:
        """Whether the block could be handed out now."""
        return block_id in self._free

    def eviction_order(self) -> Iterator[int]:
        """The free queue, next to go first."""
        return iter(self._free)

    # --- actions ---

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hand out blocks with one reference each, evicting cached ones last; None if too few."""
        if num_blocks > len(self._free):
            return None
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            self.unpublish(block_id)
            self._num_references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block, reviving cached ones."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                if self._num_copies[block_id]:
                    self._num_draining -= 1
                else:
                    del self._free[block_id]
            self._num_references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take a reference from each block. Pass a table in reverse, so that prefixes live longest.

        A block without further references and copies joins the free queue.
        """
        for block_id in block_ids:
            assert self._num_references[block_id] > 0, block_id
            self._num_references[block_id] -= 1
            if self._num_references[block_id] == 0:
                if self._num_copies[block_id]:
                    self._num_draining += 1
                else:
                    self._join_free_queue(block_id, evict_first=False)

    def publish(self, block_id: int, block_hash: bytes) -> bool:
        """Make the block's content findable; False if another block already has that content."""
        assert self._hashes[block_id] is None, (block_id, block_hash)
        if block_hash in self._block_ids:
            return False
        assert block_id not in self._free, block_id
        self._hashes[block_id] = block_hash
        self._block_ids[block_hash] = block_id
        return True

    def unpublish(self, block_id: int) -> None:
        """Forget the block's content, if it has a hash."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._block_ids[block_hash]
            self._hashes[block_id] = None
            if block_id in self._free:
                self._free.move_to_end(block_id, last=False)

    def begin_copy(self, block_id: int) -> None:
        """A copy into or out of the block was planned: it is not handed out before ``end_copy``."""
        if self._num_references[block_id] == 0 and self._num_copies[block_id] == 0:
            del self._free[block_id]
            self._num_draining += 1
        self._num_copies[block_id] += 1

    def end_copy(self, block_id: int, *, evict_first: bool = False) -> None:
        """A copy has ended. ``evict_first``: if the block is now free, it is the next to go."""
        assert self._num_copies[block_id] > 0, block_id
        self._num_copies[block_id] -= 1
        if self._num_copies[block_id] == 0 and self._num_references[block_id] == 0:
            self._num_draining -= 1
            self._join_free_queue(block_id, evict_first=evict_first)

    def _join_free_queue(self, block_id: int, *, evict_first: bool) -> None:
        self._free[block_id] = None
        if evict_first or self._hashes[block_id] is None:
            self._free.move_to_end(block_id, last=False)

    def check(self) -> None:
        """Assert that the books balance; for tests and for an idle engine."""
        for block_id in range(self.num_blocks):
            facts = (block_id, self._num_references[block_id], self._num_copies[block_id])
            assert min(facts) >= 0, facts
            idle = self._num_references[block_id] == 0 and self._num_copies[block_id] == 0
            assert idle == (block_id in self._free), facts
            block_hash = self._hashes[block_id]
            assert block_hash is None or self._block_ids[block_hash] == block_id, facts
        num_hashes = sum(h is not None for h in self._hashes)
        assert num_hashes == len(self._block_ids), (num_hashes, len(self._block_ids))
        num_draining = sum(
            r == 0 and c > 0 for r, c in zip(self._num_references, self._num_copies, strict=True)
        )
        assert num_draining == self._num_draining, (num_draining, self._num_draining)
