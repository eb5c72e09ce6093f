"""Compiling, before anything is served, the kernels that requests may ask for later.

Owns the list of what a step may launch beside the model: kinds of sampling, changes to logits,
copies of blocks. Knows nothing of models or plans. A kernel is compiled when it is first launched,
for the dtypes it gets, which takes seconds that no request should wait for.
"""

import torch

from pagetier import kernels
from pagetier.handler.sampler import RowSettings, sample
from pagetier.handler.sampling_params import SamplingParams

_KINDS_OF_SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1),
)


@torch.inference_mode()
def warm_up(pages: torch.Tensor, vocab_size: int, dtype: torch.dtype) -> None:
    """Launch each kernel once, without changing anything that is held.

    Args:
        pages: of the GPU tier, ``(blocks, block_bytes)``.
        vocab_size: columns of the logits.
        dtype: of the model's logits; those that rules have changed are float32.
    """
    device = pages.device
    for own_dtype in dict.fromkeys((dtype, torch.float32)):
        logits = torch.zeros(1, vocab_size, dtype=own_dtype, device=device)
        for params in _KINDS_OF_SAMPLING:
            sample(logits, RowSettings.of([params], [0], [0]))
    logits = torch.zeros(1, vocab_size, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    counts = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)
    kernels.penalise_rows(logits, row, counts, row, torch.ones(1, 3, device=device))
    num_words = -(-vocab_size // 32)
    kernels.allow_tokens(logits, row, torch.zeros(1, num_words, dtype=torch.int32, device=device))
    kernels.copy_blocks(pages, torch.zeros(1, 2, dtype=torch.int64, device=device))
