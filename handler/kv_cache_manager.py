"""Which block of which tier holds what: block tables, prefix matches, swaps and copy-on-write.

Owns both tiers' block pools, the block tables of sequences, and the plans of copies between the
tiers. It plans copies and is told when they have ended; it never moves a byte and never waits.
Knows nothing of queues, budgets or devices, and imports no torch. One KV group for now: a sequence
has one block table, ``block_tables[0]``.

Content hashes are SHA-256, chained over a sequence's full blocks and salted by the engine
(model, dtype, layout), by the request's ``cache_salt``, and, without prefix caching, by the
request's id: then swapping works by the same lookups, but no two requests ever match.

Preemption by swapping is demotion: every computed block of the victim gets a copy in the CPU tier
(most may have one already), the sequence keeps references to those copies, and its GPU blocks are
released, quarantined until they have been read. Resuming is a prefix match over both tiers. The
partly filled last block travels under a key of its own, so that a swapped sequence resumes byte
for byte.
"""

import dataclasses
import enum
import hashlib
import itertools
from array import array

from pagetier.handler.block_pool import BlockPool
from pagetier.handler.sequence import Sequence

_NOT_ON_GPU = -1
# How far ahead of eviction cached blocks are copied out: at least a large admission's worth.
_MIN_DEMOTION_WINDOW = 16
_MAX_DEMOTION_WINDOW = 256


class Direction(enum.Enum):
    """Which way a copy between tiers goes."""

    OUT = "out"  # GPU to CPU
    IN = "in"  # CPU to GPU


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """Blocks copied between the tiers together: all of them arrive, or none is trusted.

    ``block_ids`` are (source, destination) pairs; ``keys`` the content each pair carries.
    """

    transfer_id: int
    direction: Direction
    block_ids: list[tuple[int, int]]
    keys: list[bytes]
    is_demotion: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The leading blocks of a sequence that a tier still holds.

    ``gpu_blocks[i]`` is -1 where block ``i`` must be loaded from ``cpu_blocks[i]``. If
    ``num_tokens`` falls inside the last block, that block is written next: it is the sequence's own
    swapped tail, or will be copied first.
    """

    gpu_blocks: list[int]
    cpu_blocks: list[int]
    num_tokens: int

    @property
    def num_loads(self) -> int:
        """Blocks that must be copied in."""
        return self.gpu_blocks.count(_NOT_ON_GPU)


class KVCacheManager:
    """Both tiers' blocks, and every sequence's table of them.

    Args:
        num_gpu_blocks: size of the GPU tier.
        num_cpu_blocks: size of the CPU tier; 0 means there is none.
        block_size: tokens in a block.
        salt: what all keys and values depend on besides tokens.
        enable_prefix_caching: whether requests may share blocks.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        num_cpu_blocks: int,
        block_size: int,
        *,
        salt: bytes = b"",
        enable_prefix_caching: bool = True,
    ) -> None:
        self.gpu = BlockPool(num_gpu_blocks)
        self.cpu = BlockPool(num_cpu_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._salt = salt
        self._transfer_ids = itertools.count()
        self._planned: list[Transfer] = []
        self._in_flight: dict[int, Transfer] = {}
        # Content on its way, not findable in a pool before it has arrived: two copies of one
        # content are one.
        self._writing: dict[bytes, int] = {}  # key -> CPU block
        self._loading: dict[bytes, int] = {}  # key -> GPU block
        self._pending_loads: dict[str, set[int]] = {}  # sequence id -> GPU blocks not yet arrived
        self._failed_loads: set[str] = set()
        self._block_copies: list[tuple[int, int]] = []
        # What each GPU block held when it was last demoted: copied out once, even if the CPU tier
        # is too small to keep it.
        self._demoted: dict[int, bytes] = {}
        self._retired: list[int] = []  # sources of this step's block copies

    # --- questions: these change nothing of what blocks hold ---

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, sequence: Sequence, *, allow_loads: bool = True) -> PrefixMatch:
        """The longest prefix that is at hand, leaving at least the last token to compute.

        It is no longer than ``sequence.max_cached_tokens``. ``allow_loads=False`` looks at the GPU
        tier only.
        """
        hashes = self._known_hashes(sequence)
        gpu_blocks: list[int] = []
        cpu_blocks: list[int] = []
        max_tokens = sequence.max_cached_tokens
        num_full = max_tokens // self.block_size
        for block_hash in hashes[:num_full]:
            gpu_block = self._lookup_gpu(block_hash)
            cpu_block = self.cpu.lookup(block_hash) if allow_loads else None
            if gpu_block is None and cpu_block is None:
                return PrefixMatch(gpu_blocks, cpu_blocks, len(gpu_blocks) * self.block_size)
            gpu_blocks.append(_NOT_ON_GPU if gpu_block is None else gpu_block)
            cpu_blocks.append(_NOT_ON_GPU if cpu_block is None else cpu_block)

        num_tokens = num_full * self.block_size
        if allow_loads and (tail := self._swapped_tail(sequence, num_full)) is not None:
            gpu_blocks.append(_NOT_ON_GPU)
            cpu_blocks.append(tail)
            num_tokens = sequence.num_swapped_tokens
        elif len(hashes) > num_full and max_tokens == sequence.num_tokens - 1:
            # The known tokens end with a full block: where it is cached, only its last token is
            # computed again, into a copy of it.
            last = self.gpu.lookup(hashes[num_full])
            if last is not None:
                gpu_blocks.append(last)
                cpu_blocks.append(_NOT_ON_GPU)
                num_tokens = sequence.num_tokens - 1
        return PrefixMatch(gpu_blocks, cpu_blocks, num_tokens)

    def num_missing_blocks(self, match: PrefixMatch, num_tokens: int) -> int:
        """How many free blocks admitting ``match`` with room for ``num_tokens`` would use up."""
        hits = [block for block in match.gpu_blocks if block != _NOT_ON_GPU]
        num_revived = sum(self.gpu.is_free(block) for block in hits)
        num_new = self.num_blocks_for(num_tokens) - len(hits)
        if match.num_tokens % self.block_size and match.gpu_blocks[-1] != _NOT_ON_GPU:
            # The last block is written next: a copy, or, if nobody else has it, in place.
            num_new += self.gpu.num_references(match.gpu_blocks[-1]) > 0
        return max(num_new, 0) + num_revived

    def num_missing_for(self, sequence: Sequence, num_tokens: int) -> int:
        """How many free blocks ``grow`` to ``num_tokens`` would use up."""
        num_new = self.num_blocks_for(num_tokens) - len(sequence.block_tables[0])
        return max(num_new, 0) + self._must_copy(sequence)

    def is_swap_settled(self, sequence: Sequence) -> bool:
        """Whether every copy out of a swapped sequence has ended."""
        return not any(self.cpu.is_copying(b) for table in sequence.swapped_blocks for b in table)

    def is_loaded(self, sequence: Sequence) -> bool:
        """Whether every block that a loading sequence waits for has arrived or failed."""
        return not self._pending_loads[sequence.sequence_id]

    def num_blocks_to_copy_out(self, sequence: Sequence) -> int:
        """Computed blocks without a copy in the CPU tier: what swapping would have to move."""
        return sum(self._find_cpu(key) is None for key in self._computed_keys(sequence))

    # --- actions on sequences ---

    def admit(self, sequence: Sequence, match: PrefixMatch, num_tokens: int) -> bool:
        """Give the sequence its matched blocks and room for ``num_tokens``.

        The caller has checked ``num_missing_blocks``. Returns whether blocks must arrive first
        (``is_loaded`` tells when); then the room is reserved now, as a load must not find itself
        without space later. Without loads, ``grow`` makes room step by step.
        """
        hits = [block for block in match.gpu_blocks if block != _NOT_ON_GPU]
        self.gpu.share(hits)
        pending = set(hits).intersection(self._loading.values()) if self._loading else set()
        table = list(match.gpu_blocks)
        if match.num_loads:
            reserved = max(self.num_blocks_for(num_tokens), len(table))
            fresh = self.gpu.allocate(reserved - len(hits))
            assert fresh is not None, (sequence.request_id, reserved, len(hits), self.gpu.num_free)
            pairs, keys = [], []
            for index, gpu_block in enumerate(match.gpu_blocks):
                if gpu_block == _NOT_ON_GPU:
                    table[index] = fresh.pop(0)
                    pairs.append((match.cpu_blocks[index], table[index]))
                    keys.append(self._key_of(sequence, index))
            table += fresh
            self._plan(Direction.IN, pairs, keys)
            pending.update(gpu_block for _, gpu_block in pairs)
        sequence.block_tables = [table]
        sequence.num_computed_tokens = match.num_tokens
        sequence.num_published_blocks = match.num_tokens // self.block_size
        if pending:
            self._pending_loads[sequence.sequence_id] = pending
        else:
            self._release_swapped(sequence)
        return bool(pending)

    def finish_load(self, sequence: Sequence) -> bool:
        """Settle a load whose copies have all ended.

        Returns whether it succeeded. If not, the sequence holds no GPU block afterwards; what did
        arrive stays cached, and what failed is not tried again.
        """
        del self._pending_loads[sequence.sequence_id]
        if sequence.sequence_id in self._failed_loads:
            self._failed_loads.remove(sequence.sequence_id)
            self._release_table(sequence)
            return False
        self._release_swapped(sequence)
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` in all and make the next slot writable; False if no room.

        Not needed up to ``sequence.num_writable_tokens``.
        """
        table = sequence.block_tables[0]
        num_new = self.num_blocks_for(num_tokens) - len(table)
        if self._must_copy(sequence) and not self._copy_on_write(sequence, max(num_new, 0)):
            return False
        if num_new > 0:
            fresh = self.gpu.allocate(num_new)
            if fresh is None:
                return False
            table.extend(fresh)
        sequence.num_writable_tokens = len(table) * self.block_size
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let ``child`` share the parent's computed blocks, the partly filled last one too.

        Whoever writes into that one next gets a copy of it, as long as another holds it.
        """
        table = parent.block_tables[0][: self.num_blocks_for(parent.num_computed_tokens)]
        self.gpu.share(table)
        child.block_tables = [table]
        parent.num_writable_tokens = child.num_writable_tokens = 0
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_published_blocks = parent.num_published_blocks

    def publish_computed(self, sequence: Sequence) -> None:
        """Make full blocks findable whose tokens are known and whose computation was launched.

        Whoever finds them runs in a later launch, and launches run in order.
        """
        num_tokens = min(sequence.num_computed_tokens, sequence.num_tokens)
        num_full = num_tokens // self.block_size
        first = sequence.num_published_blocks
        if num_full <= first:
            return
        hashes = self._known_hashes(sequence)
        for block_id, block_hash in zip(
            sequence.block_tables[0][first:num_full], hashes[first:num_full], strict=True
        ):
            if self.gpu.hash_of(block_id) is None:  # else a fork that shares it was first
                self.gpu.publish(block_id, block_hash)
        sequence.num_published_blocks = num_full

    def swap_out(self, sequence: Sequence) -> bool:
        """Move a sequence's computed blocks to the CPU tier; False if they do not fit there."""
        self.publish_computed(sequence)
        keys = self._computed_keys(sequence)
        found = [self._find_cpu(key) for key in keys]
        shared = [block for block in found if block is not None]
        self.cpu.share(shared)
        fresh = self.cpu.allocate(len(keys) - len(shared))
        if fresh is None:
            self.cpu.release(reversed(shared))
            return False
        table = sequence.block_tables[0]
        swapped, pairs, new_keys = [], [], []
        for index, (key, cpu_block) in enumerate(zip(keys, found, strict=True)):
            if cpu_block is None:
                cpu_block = fresh.pop(0)
                pairs.append((table[index], cpu_block))
                new_keys.append(key)
            swapped.append(cpu_block)
        if pairs:
            self._plan(Direction.OUT, pairs, new_keys)
        sequence.swapped_blocks = [swapped]
        sequence.num_swapped_tokens = sequence.num_computed_tokens
        self._release_table(sequence)
        return True

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence's GPU blocks away, to be recomputed where they do not stay cached."""
        self.publish_computed(sequence)
        self._release_table(sequence)

    def free(self, sequence: Sequence) -> None:
        """Take everything from a sequence that ends, in whatever state it is."""
        self._pending_loads.pop(sequence.sequence_id, None)
        self._failed_loads.discard(sequence.sequence_id)
        if sequence.block_tables and not self.enable_prefix_caching:
            for block_id in sequence.block_tables[0]:
                if self.gpu.num_references(block_id) == 1:  # no fork has it too
                    self.gpu.unpublish(block_id)
        self._release_table(sequence)
        self._release_swapped(sequence)

    # --- actions on copies ---

    def begin_step(self) -> None:
        """A new step is being scheduled: sources of the last step's block copies are let go."""
        self.gpu.release(self._retired)
        self._retired.clear()

    def take_block_copies(self) -> list[tuple[int, int]]:
        """Copies inside the GPU tier (source, destination) to run before the step."""
        copies, self._block_copies = self._block_copies, []
        return copies

    def take_transfers(self) -> list[Transfer]:
        """Planned copies between the tiers, to be submitted before the step is launched."""
        planned, self._planned = self._planned, []
        return planned

    @property
    def num_transfers_in_flight(self) -> int:
        """Copies planned or submitted that have not ended."""
        return len(self._in_flight)

    def complete(self, transfer_id: int, *, ok: bool) -> Transfer:
        """A transfer has ended. A failed one makes no block valid."""
        transfer = self._in_flight.pop(transfer_id)
        for (source, destination), key in zip(transfer.block_ids, transfer.keys, strict=True):
            if transfer.direction is Direction.OUT:
                del self._writing[key]
                if ok:
                    self.cpu.publish(destination, key)
                self.cpu.end_copy(destination)
                self.gpu.end_copy(source, evict_first=ok and transfer.is_demotion)
            else:
                del self._loading[key]
                if not ok:
                    self.cpu.unpublish(source)  # do not try this copy again
                elif self.gpu.lookup(key) is None and not self._is_tail_key(key):
                    self.gpu.publish(destination, key)
                self.cpu.end_copy(source)
                self.gpu.end_copy(destination)
                for sequence_id, pending in self._pending_loads.items():
                    if destination in pending:
                        pending.remove(destination)
                        if not ok:
                            self._failed_loads.add(sequence_id)
        return transfer

    def plan_demotion(self) -> None:
        """Copy out cached blocks that are about to be evicted, so that the CPU tier keeps them.

        Looks at the head of the eviction order only: while blocks without content are plenty,
        nothing moves.
        """
        if not self.enable_prefix_caching or not self.cpu.num_blocks:
            return
        if any(t.is_demotion for t in self._in_flight.values()):
            return  # one at a time
        window = self.gpu.num_blocks // 4
        window = min(max(window, _MIN_DEMOTION_WINDOW), _MAX_DEMOTION_WINDOW)
        candidates: list[tuple[int, bytes]] = []
        for block_id in itertools.islice(self.gpu.eviction_order(), window):
            block_hash = self.gpu.hash_of(block_id)
            if block_hash is None or self._demoted.get(block_id) == block_hash:
                continue
            if self._find_cpu(block_hash) is None:
                candidates.append((block_id, block_hash))
        destinations = self.cpu.allocate(min(len(candidates), self.cpu.num_free))
        if not destinations:
            return
        candidates = candidates[: len(destinations)]
        self._demoted.update(candidates)
        pairs = [(b, d) for (b, _), d in zip(candidates, destinations, strict=True)]
        self._plan(Direction.OUT, pairs, [h for _, h in candidates], is_demotion=True)
        self.cpu.release(destinations)  # nobody waits for them: cached once they have arrived

    def check(self, sequences: list[Sequence]) -> None:
        """Assert the invariants between pools and tables; for tests."""
        self.gpu.check()
        self.cpu.check()
        for pool, tables in (
            (self.gpu, [t for s in sequences for t in s.block_tables] + [self._retired]),
            (self.cpu, [t for s in sequences for t in s.swapped_blocks]),
        ):
            held = [0] * pool.num_blocks
            for table in tables:
                for block_id in table:
                    held[block_id] += 1
            for block_id, count in enumerate(held):
                assert pool.num_references(block_id) == count, (block_id, count)
        for sequence in sequences:
            first = sequence.num_computed_tokens // self.block_size
            for table in sequence.block_tables:
                for block_id in table[first : sequence.num_writable_tokens // self.block_size]:
                    assert self._num_holders(block_id) == 1, (sequence.sequence_id, block_id)
                    assert self.gpu.hash_of(block_id) is None, (sequence.sequence_id, block_id)

    # --- helpers ---

    def _plan(
        self,
        direction: Direction,
        block_ids: list[tuple[int, int]],
        keys: list[bytes],
        *,
        is_demotion: bool = False,
    ) -> None:
        transfer = Transfer(next(self._transfer_ids), direction, block_ids, keys, is_demotion)
        source_pool, target_pool = (
            (self.gpu, self.cpu) if direction is Direction.OUT else (self.cpu, self.gpu)
        )
        on_the_way = self._writing if direction is Direction.OUT else self._loading
        for (source, destination), key in zip(block_ids, keys, strict=True):
            source_pool.begin_copy(source)
            target_pool.begin_copy(destination)
            on_the_way[key] = destination
        self._planned.append(transfer)
        self._in_flight[transfer.transfer_id] = transfer

    def _lookup_gpu(self, block_hash: bytes) -> int | None:
        block_id = self.gpu.lookup(block_hash)
        return self._loading.get(block_hash) if block_id is None else block_id

    def _find_cpu(self, key: bytes) -> int | None:
        """The CPU block that holds or is about to hold this content."""
        block_id = self.cpu.lookup(key)
        return self._writing.get(key) if block_id is None else block_id

    def _must_copy(self, sequence: Sequence) -> bool:
        """Whether the next slot lies in a block that others may read."""
        table = sequence.block_tables[0]
        index = sequence.num_computed_tokens // self.block_size
        if index >= len(table):
            return False
        block_id = table[index]
        return self._num_holders(block_id) > 1 or self.gpu.hash_of(block_id) is not None

    def _num_holders(self, block_id: int) -> int:
        """Tables that have the block, not counting those that get a copy of it in this step."""
        return self.gpu.num_references(block_id) - self._retired.count(block_id)

    def _copy_on_write(self, sequence: Sequence, num_more: int) -> bool:
        """Put a private copy in the place of the next block written; False if there is no room.

        ``num_more`` blocks must still be free afterwards.
        """
        table = sequence.block_tables[0]
        index = sequence.num_computed_tokens // self.block_size
        source = table[index]
        fresh = self.gpu.allocate(1) if self.gpu.num_free > num_more else None
        if fresh is not None:
            self._block_copies.append((source, fresh[0]))
            table[index] = fresh[0]
            self._retired.append(source)
            return True
        if self._num_holders(source) == 1 and not self.gpu.is_copying(source):
            self.gpu.unpublish(source)  # nobody else has it: written in place
            return True
        return False

    def _release_table(self, sequence: Sequence) -> None:
        for table in sequence.block_tables:
            self.gpu.release(reversed(table))
        sequence.block_tables = []
        sequence.num_writable_tokens = 0
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0

    def _release_swapped(self, sequence: Sequence) -> None:
        for table in sequence.swapped_blocks:
            if sequence.num_swapped_tokens % self.block_size or not self.enable_prefix_caching:
                private = table[-1:] if self.enable_prefix_caching else table
                for block_id in private:
                    self.cpu.unpublish(block_id)
            self.cpu.release(reversed(table))
        sequence.swapped_blocks = []
        sequence.num_swapped_tokens = 0

    def _known_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of all full blocks of known tokens; computed once each."""
        hashes = sequence.block_hashes
        num_full = sequence.num_tokens // self.block_size
        if len(hashes) < num_full:
            previous = hashes[-1] if hashes else self._root(sequence)
            for index in range(len(hashes), num_full):
                start = index * self.block_size
                previous = _chain(previous, sequence.token_ids[start : start + self.block_size])
                hashes.append(previous)
        return hashes

    def _root(self, sequence: Sequence) -> bytes:
        owner = "" if self.enable_prefix_caching else sequence.request_id
        salts = (self._salt, sequence.cache_salt.encode(), owner.encode())
        # Lengths first, so that no two lists of salts run together into the same bytes.
        return hashlib.sha256(b"".join(b"%d:%b" % (len(s), s) for s in salts)).digest()

    def _computed_keys(self, sequence: Sequence) -> list[bytes]:
        """The key of every computed block of a sequence, that of a partial one last."""
        num_tokens = sequence.num_computed_tokens
        keys = self._known_hashes(sequence)[: num_tokens // self.block_size]
        if num_tokens % self.block_size:
            keys = [*keys, self._tail_key(sequence, num_tokens)]
        return keys

    def _key_of(self, sequence: Sequence, index: int) -> bytes:
        """The key under which block ``index`` of a sequence is loaded."""
        tail = sequence.num_swapped_tokens
        if tail % self.block_size and index == tail // self.block_size:
            return self._tail_key(sequence, tail)
        return self._known_hashes(sequence)[index]

    @staticmethod
    def _tail_key(sequence: Sequence, num_tokens: int) -> bytes:
        """Private to the sequence, and never equal to a content hash (which has 32 bytes)."""
        return b"tail:%d:%b" % (num_tokens, sequence.sequence_id.encode()) + bytes(32)

    @staticmethod
    def _is_tail_key(key: bytes) -> bool:
        return len(key) > 32

    def _swapped_tail(self, sequence: Sequence, num_full: int) -> int | None:
        """The CPU block of the partial tail that continues ``num_full`` blocks, if it is valid."""
        num_tokens = sequence.num_swapped_tokens
        if num_tokens % self.block_size == 0 or num_tokens // self.block_size != num_full:
            return None
        return self.cpu.lookup(self._tail_key(sequence, num_tokens))


def _chain(previous: bytes, token_ids: list[int]) -> bytes:
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()
