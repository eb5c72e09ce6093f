"""What is launched before anything is served, so that no request waits for a compiler."""

import pytest
import torch

from pagetier import kernels
from pagetier.handler.sampler import RowSettings, sample
from pagetier.handler.sampling_params import SamplingParams
from pagetier.handler.warm_up import warm_up


def test_every_kernel_beside_the_model_is_launched_and_pages_stay_as_they_are(monkeypatch):
    launched = set()

    def recorded(name):
        operation = getattr(kernels, name)

        def launch(*args, **kwargs):
            launched.add((name, args[0].dtype, *kwargs.values()))
            return operation(*args, **kwargs)

        return launch

    for name in ("allow_tokens", "copy_blocks", "greedy_tokens", "penalise_rows", "sample_tokens"):
        monkeypatch.setattr(kernels, name, recorded(name))
    pages = torch.randint(0, 255, (4, 64), dtype=torch.uint8)
    before = pages.clone()
    warm_up(pages, 70, torch.bfloat16)
    assert torch.equal(pages, before)
    kinds = [("greedy_tokens",), ("sample_tokens", False), ("sample_tokens", True)]
    assert launched == {
        ("allow_tokens", torch.float32),
        ("copy_blocks", torch.uint8),
        ("penalise_rows", torch.float32),
        *(
            (name, dtype, *flags)
            for name, *flags in kinds
            for dtype in (torch.bfloat16, torch.float32)
        ),
    }


@pytest.mark.gpu
def test_sampling_compiles_nothing_after_it(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    from triton.runtime.jit import JITFunction

    vocabulary = 128_256
    warm_up(torch.zeros(4, 4096, dtype=torch.uint8, device="cuda"), vocabulary, torch.bfloat16)

    def refuse(*_, **__):
        raise AssertionError("a kernel is compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", refuse)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.1),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        for some in (params[:1], params[3:], params, params * 20):
            logits = torch.randn(len(some), vocabulary, device="cuda").to(dtype)
            count = len(some)
            sample(logits, RowSettings.of(some, list(range(count)), list(range(count))))
    torch.cuda.synchronize()
