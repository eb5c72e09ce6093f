"""Every kernel, and every entry of a table, compiled for GPUs that this machine does not have.

A kernel that needs more shared memory or registers than a chip has would fail, or crawl, only on
somebody else's machine.
"""

import functools
import importlib
import os
import pkgutil

import numpy as np
import pytest
import torch

import pagetier.kernels
from pagetier.kernels import AttentionMetadata, tuning
from pagetier.offload.tiers import KVLayout, LayerKV

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from support.cross_compile import SHARED_BYTES, compiling_for

from pagetier.kernels import (
    attention,
    block_copy,
    elementwise,
    kv_write,
    logit_changes,
    packing,
    projection,
    quantised_projection,
    sampling,
    step_state,
)

# Compute capabilities of the chips that tables are named after.
CHIPS = {"h100": 90, "h200": 90}
# Where entries were the fastest on the chip itself, whether or not they spill.
MEASURED = {90}


def attend(
    lens,
    dtype,
    *,
    heads=(32, 8),
    head_dim=128,
    value_dim=None,
    kv_dtype=None,
    sinks=None,
    **features,
) -> None:
    """Launch attention over ``lens``, (new tokens, tokens in all) of each sequence."""
    kv_dtype = kv_dtype or dtype
    layout = KVLayout((LayerKV(heads[1], head_dim, value_dim or head_dim),), 16, kv_dtype)
    k_cache, v_cache, scales = layout.views(layout.allocate(4, "cpu"))[0]
    features |= scales
    starts = np.cumsum([0] + [query_len for query_len, _ in lens])
    metadata = AttentionMetadata.build(
        torch.zeros(len(lens), 4096, dtype=torch.int32),
        torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
    )
    q = torch.zeros(int(starts[-1]), heads[0], head_dim, dtype=dtype)
    sinks = torch.zeros(heads[0]) if sinks else None
    attention.paged_attention(q, k_cache, v_cache, metadata, scale=0.1, sinks=sinks, **features)


def attend_with_features(dtype, capability) -> None:
    mixed = [(1, 900), (64, 900)]
    attend(mixed, dtype, head_dim=64, heads=(64, 8), sinks=True, window=128)  # gpt-oss
    if capability >= 80:  # compiling for older ones takes several times as long
        attend(mixed, dtype, head_dim=256, heads=(8, 4), softcap=50.0, window=512)  # Gemma 2


def write_keys_and_values(dtype, _capability) -> None:
    for head_dim, kv_dtype in ((64, dtype), (96, dtype), (128, torch.int8)):
        k_cache, v_cache = (torch.zeros(4, 8, 16, head_dim, dtype=kv_dtype) for _ in range(2))
        q, key, value = (torch.zeros(7, 8, head_dim, dtype=dtype) for _ in range(3))
        scales = {}
        if kv_dtype is torch.int8:
            scales = {name: torch.ones(4, 8, 16) for name in ("k_scale", "v_scale")}
        cos = torch.zeros(7, head_dim, dtype=dtype)
        slots = torch.arange(7)
        kv_write.write_kv(key, value, k_cache, v_cache, slots, **scales)
        kv_write.write_rotated_kv(q, key, value, cos, cos, k_cache, v_cache, slots, **scales)


def copy_blocks(_dtype, _capability) -> None:
    for block_bytes in (65536, 100):
        pages = torch.zeros(300, block_bytes, dtype=torch.uint8)
        staging = torch.zeros(4, block_bytes, dtype=torch.uint8)
        block_copy.copy_blocks(pages, [(0, 1)] * 257)
        block_copy.gather_blocks(pages, [3, 1], staging)
        block_copy.scatter_blocks(staging, pages, [3, 1])
        block_copy.transfer_blocks(pages, staging, [(3, 1)])


def project(use, num_tokens, dtype, *, out_size=4096, in_size=4096, bias=False) -> None:
    x = torch.zeros(num_tokens, in_size, dtype=dtype)
    # Nothing reads it: memory that was never touched costs nothing.
    weight = torch.empty(out_size, in_size, dtype=dtype)
    added = torch.zeros(out_size, dtype=dtype) if bias else None
    projection.launch(x, weight, added, x.new_empty(num_tokens, out_size), use)


def project_in_common_ways(dtype, _capability) -> None:
    matrix = {"kernel": "matrix", "outs": 32, "ins": 32, "splits": 2, "num_stages": 2}
    for tokens, swap in ((16, False), (8, True)):
        use = {**matrix, "tokens": tokens, "swap": swap, "num_warps": 4}
        project(use, tokens, dtype, bias=True)
    vector = {"kernel": "vector", "outs": 8, "ins": 512, "splits": 2, "unroll": 1, "num_warps": 4}
    project(vector, 1, dtype, in_size=4100)


def project_quantised(
    use, num_tokens, dtype, bits, group_size, *, out_size=64, in_size=1024, zeros=True
) -> None:
    words = packing.num_lines(in_size, bits) * packing.WORDS
    shape = (in_size // group_size if group_size else 1, out_size)
    x = torch.zeros(num_tokens, in_size, dtype=dtype)
    quantised_projection.launch(
        x,
        torch.zeros(out_size, words, dtype=torch.int32),
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=torch.uint8) if zeros else None,
        None,
        x.new_empty(num_tokens, out_size),
        group_size,
        bits,
        use,
    )


def project_quantised_in_other_ways(dtype, _capability) -> None:
    """Entries are compiled for the usual way: 4 bits, groups of 128 with zeros of their own."""
    for num_tokens in (1, 16):
        use = quantised_settings(num_tokens)
        project_quantised(use, num_tokens, dtype, 8, 0, zeros=False)


def quantised_settings(num_tokens):
    shape = {"bits": 8, "num_tokens": num_tokens, "out_size": 64, "in_size": 1024}
    return tuning.settings("quantised_linear", torch.device("cpu"), **shape)


def normalise_and_activate(dtype, _capability) -> None:
    x = torch.zeros(3, 4096, dtype=dtype)
    elementwise.rms_norm(x, x[0], 1e-5, residual=x)
    elementwise.layer_norm(x, x[0], x[0], 1e-5)
    elementwise.gated(x, "silu")
    elementwise.gated(x, "gelu_tanh")


def choose_tokens(dtype, _capability) -> None:
    rows = 3
    floats, integers = torch.zeros(rows, 3), torch.zeros(rows, 3, dtype=torch.int64)
    logits = torch.zeros(rows, 128256, dtype=dtype)
    sampling.greedy_tokens(logits)
    temperature, top_p, min_p = floats.unbind(1)
    top_k, seeds, positions = integers.unbind(1)
    sampling.sample_tokens(logits, temperature, top_k, top_p, min_p, seeds, positions)


def change_logits(_dtype, _capability) -> None:
    logits, counts = torch.zeros(3, 128256), torch.zeros(3, 128256, dtype=torch.int32)
    rows = torch.arange(3)
    logit_changes.allow_tokens(logits, rows, torch.zeros(3, 4008, dtype=torch.int32))
    logit_changes.penalise_rows(logits, rows, counts, rows, torch.ones(3, 3))


def keep_state(_dtype, _capability) -> None:
    rows, tokens, computed = (torch.zeros(4, dtype=torch.int64) for _ in range(3))
    tables = torch.zeros(4, 64, dtype=torch.int32)
    out = {name: torch.zeros_like(rows) for name in ("token_ids", "positions", "slots")}
    step_state.read_rows(
        rows, tokens, computed, tables, block_size=16, batch_tables=tables.clone(),
        seq_lens=torch.zeros(4, dtype=torch.int32), **out,
    )  # fmt: skip
    step_state.advance_rows(rows, tokens, tokens, computed)
    changes = [torch.zeros(2, width, dtype=torch.int64) for width in (3, 2, 2)]
    step_state.change_rows(*changes, tokens, computed, tables)


LAUNCHES = (
    attend_with_features,
    write_keys_and_values,
    copy_blocks,
    project_in_common_ways,
    project_quantised_in_other_ways,
    normalise_and_activate,
    choose_tokens,
    change_logits,
    keep_state,
)


def launch_linear(entry, dtype, _capability) -> None:
    when = entry.when
    if entry.use["kernel"] != "torch":
        shape = {name: when.get(name, 4096) for name in ("out_size", "in_size")}
        _, num_tokens = when["num_tokens"]
        project(entry.use, num_tokens, dtype, **shape)


def launch_quantised_linear(entry, dtype, _capability) -> None:
    num_tokens = _largest(entry.when.get("num_tokens", 100), at_most=128)
    project_quantised(entry.use, num_tokens, dtype, entry.when.get("bits", 4), 128)


def launch_attention(entry, dtype, capability, operation) -> None:
    """One launch for each kind of keys and values that the entry may be chosen for."""
    when = entry.when
    kinds = {"2 bytes": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    row_bytes = _largest(when.get("row_bytes", 512), at_most=512)
    num_sequences = _largest(when.get("sequences", 4), at_most=64)
    num_rows = _largest(when.get("rows", 64), at_most=128)
    lens = [(1, 900)] * num_sequences if operation == "decode_attention" else [(num_rows, 900)]
    for kind in [when["kv"]] if "kv" in when else ["2 bytes", "int8"]:
        head_dim = row_bytes // kinds[kind].itemsize
        exists = kind != "fp8" or capability >= 89
        if exists and when.get("itemsize", 2) == 2 and head_dim <= 256:
            attend(lens, dtype, kv_dtype=kinds[kind], head_dim=head_dim, heads=(8, 8))


def _largest(bounds, *, at_most) -> int:
    return min(bounds[1] if isinstance(bounds, list) else bounds, at_most)


# How an entry of each operation is launched.
ENTRY_LAUNCHES = {
    "linear": launch_linear,
    "quantised_linear": launch_quantised_linear,
    "decode_attention": functools.partial(launch_attention, operation="decode_attention"),
    "prefill_attention": functools.partial(launch_attention, operation="prefill_attention"),
}


def kernel_names() -> set[str]:
    """Names of all kernels of the package; functions that these call are named otherwise."""
    names = set()
    for module in pkgutil.iter_modules(pagetier.kernels.__path__, "pagetier.kernels."):
        for name in vars(importlib.import_module(module.name)):
            if name.endswith("_kernel"):
                names.add(name)
    return names


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_and_table_entry_fits_the_chip(capability, monkeypatch):
    # bf16 came with compute capability 8.0.
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    chips = [name for name, of in CHIPS.items() if of == capability]
    general = (f"cc{capability}", "default")
    problems, names = [], set()
    for table in (*chips, *general, None):
        # What an entry's shapes are really given may be an earlier entry's.
        families = (table, *general) if table in chips else general
        monkeypatch.setattr(tuning, "families", lambda _device, families=families: families)
        with compiling_for(capability) as compiled:
            for operation, entries in (tuning.packaged(table) if table else {}).items():
                for entry in entries:
                    ENTRY_LAUNCHES[operation](entry, dtype, capability)
            for launch in LAUNCHES if table is None else ():
                launch(dtype, capability)
        may_spill = table is not None and capability in MEASURED
        problems += filter(None, (kernel.problem(may_spill=may_spill) for kernel in compiled))
        names |= {kernel.name for kernel in compiled}
    assert not problems, "\n".join(problems)
    assert kernel_names() <= names


def test_every_table_is_compiled_for_some_chip():
    known = {"default", *CHIPS, *(f"cc{capability}" for capability in SHARED_BYTES)}
    assert set(tuning.packaged_names()) <= known


def test_a_kernel_that_asks_for_too_much_is_found():
    use = {
        "kernel": "matrix", "tokens": 64, "outs": 128, "ins": 128, "splits": 1, "swap": False,
        "num_warps": 4, "num_stages": 4,
    }  # fmt: skip
    problems = {}
    for capability in (90, 86):
        with compiling_for(capability) as compiled:
            project(use, 64, torch.bfloat16)
        [kernel] = compiled
        problems[capability] = kernel.problem()
    assert problems[90] is None
    assert "bytes of shared memory" in problems[86]
    with compiling_for(90) as compiled:
        project({**use, "tokens": 256, "num_stages": 2}, 256, torch.bfloat16)
    assert "bytes of spilled registers" in compiled[0].problem()
