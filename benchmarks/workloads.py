"""What is asked of every engine: prompts as token ids, and how many tokens to generate for each.

Owns the requests of each workload. Lengths depend on the workload alone, token ids a seed
too, which is another in each round: every engine gets the same requests, and none has seen a
round's prompts before.
"""

import random

import msgspec

# Ids below this exist in every shape; prompts are drawn from them.
_MIN_TOKEN, _MAX_TOKEN = 10, 500


class Request(msgspec.Struct, frozen=True):
    """A prompt, and the exact number of tokens to generate, whatever they are."""

    prompt: list[int]
    num_new: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt) + self.num_new


def tokens(rng: random.Random, count: int) -> list[int]:
    """Random token ids that every shape has."""
    return [rng.randint(_MIN_TOKEN, _MAX_TOKEN) for _ in range(count)]


def mixed(num_requests: int, shortest: int, longest: int, seed: str) -> list[Request]:
    """Requests whose prompts and outputs are each of ``shortest`` to ``longest`` tokens."""
    lengths = random.Random(0)
    rng = random.Random(seed)
    return [
        Request(tokens(rng, lengths.randint(shortest, longest)), lengths.randint(shortest, longest))
        for _ in range(num_requests)
    ]


def equal(num_requests: int, prompt_len: int, num_new: int, seed: str) -> list[Request]:
    """Requests of equal lengths."""
    rng = random.Random(seed)
    return [Request(tokens(rng, prompt_len), num_new) for _ in range(num_requests)]


def shared_prefix(
    num_requests: int, prefix_len: int, suffix_len: int, num_new: int, seed: str
) -> list[Request]:
    """Requests that begin with the same tokens, as behind one system prompt."""
    rng = random.Random(seed)
    prefix = tokens(rng, prefix_len)
    return [Request(prefix + tokens(rng, suffix_len), num_new) for _ in range(num_requests)]


def num_blocks(requests: list[Request], block_size: int) -> int:
    """KV blocks that all requests together hold at their ends: the demand."""
    return sum(-(-r.num_tokens // block_size) for r in requests)
