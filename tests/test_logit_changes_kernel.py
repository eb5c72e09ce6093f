"""Masks and penalties of logits as Triton kernels: interpreted on the CPU, compiled on a GPU."""

import numpy as np
import pytest
import torch
from support.interpreter import DEVICES, run_under_interpreter, skip_unless_kernels_run

from pagetier.kernels import logit_changes, reference
from pagetier.kernels.reference.logit_changes import IN_PROMPT


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    skip_unless_kernels_run(request.param)
    return request.param


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_changes, "_TILE", 64)


def test_all_of_this_under_the_interpreter():
    run_under_interpreter(__file__, at_least=12)


def random_logits(rows: int, vocabulary: int, device: str) -> torch.Tensor:
    """In rows that do not touch, NaN between them."""
    logits = torch.full((rows, vocabulary + 5), float("nan"))
    generator = torch.Generator().manual_seed(vocabulary)
    logits[:, :vocabulary] = 3 * torch.randn(rows, vocabulary, generator=generator)
    return logits.to(device)[:, :vocabulary]


def whole(logits: torch.Tensor) -> torch.Tensor:
    """What lies between rows included."""
    return logits.as_strided((logits.shape[0], logits.stride(0)), logits.stride())


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_forbid_what_they_do_not_allow(vocabulary, dtype, device):
    rng = np.random.default_rng(vocabulary)
    # More words than tokens, and the highest bits among them.
    is_allowed = rng.random((3, 352)) < 0.3
    words = np.packbits(is_allowed, axis=1, bitorder="little").view(np.int32)
    masks, rows = torch.tensor(words, device=device), torch.tensor([4, 0, 2], device=device)
    logits = random_logits(6, vocabulary, device).to(dtype)
    expected = logits.clone()
    for row, allowed in zip((4, 0, 2), is_allowed, strict=True):
        forbidden = torch.tensor(~allowed[:vocabulary], device=device)
        expected[row].masked_fill_(forbidden, -torch.inf)
    logit_changes.allow_tokens(logits, rows, masks)
    assert torch.equal(logits, expected)
    logit_changes.allow_tokens(logits, rows[:0], masks[:0])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocabulary", [1, 64, 300])
def test_penalties_equal_the_reference_and_touch_nothing_else(vocabulary, device):
    logits = random_logits(5, vocabulary, device)
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 4, (7, vocabulary), generator=generator, dtype=torch.int32) % 3
    counts[:, ::3] += IN_PROMPT
    counts = counts.to(device)
    samples, rows = (torch.tensor(x, device=device) for x in ([3, 0, 4], [6, 2, 0]))
    strengths = torch.tensor([[1.3, 0.5, 0.0], [0.8, 0.0, -1.0], [1.0, 0.0, 0.0]], device=device)
    before = whole(logits).clone()
    expected = logits.cpu().clone()
    reference.penalise_rows(expected, samples.cpu(), counts.cpu(), rows.cpu(), strengths.cpu())
    logit_changes.penalise_rows(logits, samples, counts, rows, strengths)
    # A GPU rounds a product and a difference once.
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-6, rtol=1e-6)
    kept = [1, 2, 4]  # row 4's strengths are neutral
    assert torch.equal(logits[kept], before[kept, :vocabulary])
    assert whole(logits)[:, vocabulary:].isnan().all()


def test_what_does_not_fit_is_refused(device):
    logits = random_logits(3, 70, device)
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    words = torch.zeros(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="not of 2 rows of 70 tokens"):
        logit_changes.allow_tokens(logits, rows, words)
    counts = torch.zeros(3, 71, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="do not belong together"):
        logit_changes.penalise_rows(logits, rows, counts, rows, torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match="must all be 1"):
        logit_changes.allow_tokens(random_logits(70, 3, device).t(), rows, words.repeat(1, 2))
