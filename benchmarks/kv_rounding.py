"""What do keys and values of 8 bits cost, and what do they give? Each ``kv_cache_dtype`` in turn.

Without ``--shape``: a real model reads texts and continues their beginnings. Printed are the mean
log-probability of a token, how far a token's own moves from that with ``auto``, how often the most
likely token is the same, and how many continuations are. With ``--shape``: random weights and
tokens, whose figures mean speed and memory alone.
"""

import argparse
import importlib
import pathlib
import pydoc
import random
import statistics
import tempfile
import time
from typing import Any

from benchmarks import record
from benchmarks.shapes import SHAPES, write_config
from pagetier import LLM, SamplingParams

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_MODULES = (
    "decimal", "argparse", "subprocess", "pathlib", "logging", "threading", "email.message",
    "fractions", "tarfile",
)  # fmt: skip
_TEXT_CHARACTERS = 1500
_TEXTS_OF_A_MODULE = 8
_BEGINNING_CHARACTERS = 200


def texts(count: int) -> list[str]:
    """Pieces of Python's own documentation."""
    pieces = []
    for name in _MODULES:
        page = pydoc.plain(pydoc.render_doc(importlib.import_module(name)))
        starts = range(0, min(len(page), _TEXTS_OF_A_MODULE * _TEXT_CHARACTERS), _TEXT_CHARACTERS)
        pieces += [page[start : start + _TEXT_CHARACTERS] for start in starts]
    return pieces[:count]


def run(args: argparse.Namespace, kv_cache_dtype: str, folder: str) -> dict[str, Any]:
    """Read and continue in a fresh engine; what came out, and what it took."""
    if args.shape:
        rng = random.Random(0)
        size = SHAPES[args.shape]["vocab_size"]
        read: list[Any] = []
        begun: list[Any] = [[rng.randrange(size) for _ in range(512)] for _ in range(args.num)]
    else:
        read = texts(args.num)
        begun = [text[:_BEGINNING_CHARACTERS] for text in read]
    settings = {"load_format": "dummy", "max_model_len": 2048} if args.shape else {}
    with LLM(
        model=folder,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=kv_cache_dtype,
        swap_space=0,
        max_num_seqs=max(args.num, 1),
        **settings,
    ) as llm:
        scored = llm.generate(
            read, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1), use_tqdm=False
        )
        params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
        llm.generate(begun[:2], params, use_tqdm=False)  # warm
        start = time.perf_counter()
        continued = llm.generate(begun, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    entries = [entry for output in scored for entry in output.prompt_logprobs[1:]]
    keys = ("device", "dtype", "kv_cache_dtype", "kv_token_bytes", "num_gpu_blocks", "block_size")
    return {
        **{key: stats[key] for key in keys},
        "output_tokens_per_second": args.num * args.new_tokens / seconds,
        "logprobs": [entry.logprob for entry in entries],
        "first_choices": [entry.top_token_ids[0] for entry in entries],
        "tokens": [output.outputs[0].token_ids for output in continued],
    }


def compared(result: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """``result`` with figures in place of what came out, ``exact`` being that of ``auto``."""
    figures = {
        key: value
        for key, value in result.items()
        if key not in ("logprobs", "first_choices", "tokens")
    }
    logprobs = result["logprobs"]
    if logprobs:
        off = sorted(abs(a - b) for a, b in zip(logprobs, exact["logprobs"], strict=True))
        same = [
            a == b for a, b in zip(result["first_choices"], exact["first_choices"], strict=True)
        ]
        figures |= {
            "num_tokens": len(logprobs),
            "mean_logprob": statistics.mean(logprobs),
            "off_median": off[len(off) // 2],
            "off_99_percent": off[len(off) * 99 // 100],
            "same_first_choice": statistics.mean(same),
        }
    equal = sum(a == b for a, b in zip(result["tokens"], exact["tokens"], strict=True))
    return figures | {"num_equal_outputs": equal, "num_outputs": len(result["tokens"])}


def main() -> None:
    """Compare, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(_ROOT / "model_store" / "pydoc-llama"))
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of a model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--num", type=int, default=48, help="texts, or requests of a shape")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, help="folder for the JSON")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        if args.shape:
            write_config(args.shape, pathlib.Path(name))
        folder = name if args.shape else args.model
        exact = run(args, "auto", folder)
        for kv in ("auto", *args.kv):
            result = exact if kv == "auto" else run(args, kv, folder)
            results[kv] = compared(result, exact)
            shown = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in results[kv].items()
            )
            print(f"{kv}: {', '.join(shown)}", flush=True)
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "model")}
    record.save("kv_rounding", {"flags": flags, "results": results}, args.out)


if __name__ == "__main__":
    main()
