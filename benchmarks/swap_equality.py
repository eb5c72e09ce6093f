"""Do forced swaps change a token? The same greedy requests with ample and with scarce KV memory.

Runs a model with random weights in float32 once with room for everything, then with a part of it
in each preemption mode, and compares every token. Prints tokens per second beside it: eager
execution with the reference attention, so no figure to be proud of.
"""

import argparse
import pathlib
import random
import tempfile
import time
from typing import Any

from benchmarks import record
from benchmarks.shapes import SHAPES, write_config
from pagetier import LLM, SamplingParams


def run(
    folder: pathlib.Path, prompts: list[list[int]], new_tokens: int, **settings: Any
) -> dict[str, Any]:
    """Generate for all prompts in a fresh engine; tokens, rate and what preemption did."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    with LLM(model=str(folder), load_format="dummy", max_model_len=2048, **settings) as llm:
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    keys = (
        "num_gpu_blocks", "num_cpu_blocks", "num_preemptions_swap", "num_preemptions_recompute",
        "num_resumes_loaded", "num_recomputed_tokens", "kv_offload_store_bytes",
        "kv_offload_load_bytes", "num_failed_transfers", "mean_running_batch", "kv_waste_perc",
        "kv_waste_preallocated_perc", "host_memory_rung", "link_bytes_per_second",
        "prefill_flops_per_second", "startup_seconds", "dtype", "device",
        "kv_cache_dtype", "kv_token_bytes",
    )  # fmt: skip
    return {
        "tokens": [o.outputs[0].token_ids for o in outputs],
        "seconds": seconds,
        "output_tokens_per_second": len(prompts) * new_tokens / seconds,
        **{key: stats[key] for key in keys},
    }


def main() -> int:
    """Compare, print, write JSON; exit status 1 if any token differs or nothing was preempted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--max-prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.25, help="scarce KV, of the demand")
    parser.add_argument("--swap-space", type=float, default=8.0)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON")
    args = parser.parse_args()

    rng = random.Random(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.randint(16, args.max_prompt))]
        for _ in range(args.num_requests)
    ]
    demand = sum(-(-(len(p) + args.new_tokens) // 16) for p in prompts)
    scarce = max(int(demand * args.share), 2048 // 16)
    common = {
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "swap_space": args.swap_space,
    }
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_config(args.shape, folder)
        ample = run(folder, prompts, args.new_tokens, num_gpu_blocks_override=demand + 64, **common)
        reference = ample.pop("tokens")
        results["ample"] = ample
        print(f"ample: {ample['output_tokens_per_second']:.0f} tokens/s", flush=True)
        for mode in ("swap", "recompute", "auto"):
            pressed = run(
                folder,
                prompts,
                args.new_tokens,
                num_gpu_blocks_override=scarce,
                preemption_mode=mode,
                **common,
            )
            tokens = pressed.pop("tokens")
            different = sum(a != b for a, b in zip(tokens, reference, strict=True))
            results[mode] = {**pressed, "num_different_outputs": different}
            print(
                f"{mode}: {different} of {len(prompts)} outputs differ; "
                f"{pressed['num_preemptions_swap']} swaps, "
                f"{pressed['num_preemptions_recompute']} recomputations, "
                f"{pressed['output_tokens_per_second']:.0f} tokens/s",
                flush=True,
            )
    flags = {k: v for k, v in vars(args).items() if k != "out"}
    record.save(f"swap_equality_{args.shape}", {"flags": flags, "results": results}, args.out)
    preempted = all(
        results[m]["num_preemptions_swap"] + results[m]["num_preemptions_recompute"] > 0
        for m in ("swap", "recompute", "auto")
    )
    equal = all(results[m]["num_different_outputs"] == 0 for m in ("swap", "recompute", "auto"))
    return 0 if preempted and equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
