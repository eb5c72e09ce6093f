"""The ``pagetier`` command: plan, make archives, serve and watch them, talk with them.

Owns the command line: its arguments, what it prints, exit codes. A mistake of the user's is one
sentence on stderr and exit code 1. Imports no torch.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from pagetier import __version__
from pagetier.handler.errors import ConfigError, EngineError, LaunchError

# Settings that have a flag of their own in ``pagetier plan``.
_PLANNED_SETTINGS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "swap_space",
    "gpu_memory_utilization",
    "device",
)
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (without the program's name) and return its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except EngineError as exc:
        print(f"pagetier: {exc.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pagetier: interrupted.", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagetier", description="Language models on TorchServe with a two-tier KV cache."
    )
    parser.add_argument("--version", action="version", version=f"pagetier {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    archive = commands.add_parser("archive", help="make a .mar archive of a model for TorchServe")
    archive.add_argument("model", help="a local Hugging Face folder, or a hub id")
    archive.add_argument(
        "-o",
        "--output",
        type=Path,
        help="the archive, NAME.mar; NAME is the model's name in TorchServe "
        "(default: model_store/, and the model's own name)",
    )
    archive.add_argument(
        "--bundle", action="store_true", help="pack the model's files into the archive"
    )
    _add_settings(archive)
    archive.set_defaults(run=_archive)

    serve = commands.add_parser("serve", help="serve archives until Ctrl-C")
    serve.add_argument("archives", nargs="+", type=Path, metavar="NAME.mar")
    serve.add_argument(
        "--port",
        type=int,
        help="for inference; management, metrics and gRPC take the four ports after it "
        "(default: those of the configuration)",
    )
    serve.add_argument(
        "--ts-config", type=Path, help="a config.properties instead of the safe installed one"
    )
    serve.add_argument(
        "--log-dir", type=Path, default=Path("logs"), help="where to log (default: logs/)"
    )
    serve.set_defaults(run=_serve)

    demo = commands.add_parser(
        "demo", help="serve a model with too little KV memory, and show that nothing is lost"
    )
    demo.add_argument("model", help="a local Hugging Face folder")
    demo.add_argument("--requests", type=int, default=8, help="concurrent requests (default: 8)")
    demo.add_argument("--max-tokens", type=int, default=96, help="of each request (default: 96)")
    demo.add_argument("--port", type=int, help="as in serve (default: free ports)")
    demo.set_defaults(run=_demo)

    plan = commands.add_parser(
        "plan", help="say where memory will go and what will fit, before anything is loaded"
    )
    plan.add_argument("model", help="a local Hugging Face folder, of which config.json is enough")
    for name, what in (
        ("--gpu-memory", "all memory of the GPU, as 12GiB or 12 (default: this machine's GPU)"),
        ("--host-memory", "free host memory (default: this machine's)"),
        ("--context", "of the GPU, the CUDA context and other processes (default: 512MiB)"),
    ):
        plan.add_argument(name, metavar="SIZE", help=what)
    for name, what in (
        ("--link", "between GPU and host, one way (default: assumes 25)"),
        ("--memory-bandwidth", "of the GPU; without it no bounds on speed are told"),
    ):
        plan.add_argument(name, type=float, metavar="GB/S", help=what)
    plan.add_argument(
        "--tflops",
        type=float,
        help="that prompts are computed with (default: assumes 50)",
    )
    plan.add_argument(
        "--input-tokens", type=int, help="of a request that is expected (default: 512)"
    )
    plan.add_argument("--output-tokens", type=int, help="likewise (default: 128)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    for name in _PLANNED_SETTINGS:
        plan.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"as --set {name}=")
    _add_settings(plan)
    plan.set_defaults(run=_plan)

    top = commands.add_parser("top", help="watch a served model: both tiers, requests, rates")
    _add_address(top)
    top.add_argument(
        "--interval", type=float, default=1.0, help="seconds between two looks (default: 1)"
    )
    top.add_argument("--once", action="store_true", help="print it once, as without a terminal")
    top.set_defaults(run=_top)

    chat = commands.add_parser("chat", help="talk with a served model")
    _add_address(chat)
    chat.add_argument("-m", "--message", help="say this only and print the answer")
    chat.add_argument("--system", help="what the model is told to be")
    chat.add_argument("--max-tokens", type=int, help="of each answer")
    chat.add_argument("--temperature", type=float)
    chat.set_defaults(run=_chat)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", metavar="URL", help="of the model: http://127.0.0.1:8080/predictions/NAME/1.0"
    )
    parser.add_argument(
        "--key",
        default=os.environ.get("PAGETIER_API_KEY", ""),
        help="the inference key (default: $PAGETIER_API_KEY)",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="an engine setting, for instance swap_space=8 or dtype=bfloat16; may be repeated",
    )


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings from ``KEY=VALUE`` texts; values are read as YAML.

    Raises:
        ConfigError: a text is not of that form, or a key is given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"'--set {pair}' must look like --set KEY=VALUE.")
        if key in settings:
            raise ConfigError(f"The setting '{key}' is given twice.", param=key)
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"The value of '--set {pair}' cannot be read; quote it as in YAML.", param=key
            ) from None
    return settings


def _archive(arguments: argparse.Namespace) -> int:
    from pagetier.handler.archive import create_archive

    name = Path(arguments.model).expanduser().resolve().name
    output = arguments.output or Path("model_store") / f"{name}.mar"
    path = create_archive(
        arguments.model,
        output,
        bundle=arguments.bundle,
        settings=parse_settings(arguments.settings),
    )
    num_bytes = path.stat().st_size
    size = f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"
    print(f"Wrote {path} ({size}).", flush=True)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from pagetier.handler.torchserve import TorchServe

    server = TorchServe(
        arguments.archives,
        ts_config=arguments.ts_config,
        port=arguments.port,
        log_dir=arguments.log_dir,
    )
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    start = time.monotonic()
    _say("Starting TorchServe ...")
    try:
        server.start()
        server.wait_ready(on_progress=lambda line: _say(f"  {line}"))
        _say(f"Ready after {time.monotonic() - start:.1f} s; the log is '{server.log_path}'.\n")
        for name, settings in server.model_settings.items():
            _say(
                _how_to_call(
                    server.openai_base_url(name),
                    server.inference_key,
                    settings.get("served_model_name") or name,
                )
            )
        if server.inference_key:
            _say(f"All keys, also those for management, are in '{server.key_path}'.")
        try:
            _say("Stop with Ctrl-C.")
            server.wait()
        except KeyboardInterrupt:
            _say("Stopping ...")
            return 0
        raise LaunchError(f"TorchServe ended by itself; see '{server.log_path}'.")
    finally:
        # Being asked twice must not leave half of it running.
        for number in _ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        server.stop()


def _demo(arguments: argparse.Namespace) -> int:
    from pagetier.handler.demo import run_demo

    signal.signal(signal.SIGTERM, _interrupt)
    return run_demo(
        arguments.model,
        num_requests=arguments.requests,
        max_tokens=arguments.max_tokens,
        port=arguments.port,
    )


def _plan(arguments: argparse.Namespace) -> int:
    from pagetier.handler.plan_view import run_plan

    pairs = [
        f"{name}={value}"
        for name in _PLANNED_SETTINGS
        if (value := getattr(arguments, name)) is not None
    ]
    return run_plan(
        {"model": arguments.model, **parse_settings([*pairs, *arguments.settings])},
        gpu_memory=arguments.gpu_memory,
        host_memory=arguments.host_memory,
        context=arguments.context,
        link=arguments.link,
        tflops=arguments.tflops,
        memory_bandwidth=arguments.memory_bandwidth,
        num_input_tokens=arguments.input_tokens,
        num_output_tokens=arguments.output_tokens,
        as_json=arguments.json,
    )


def _top(arguments: argparse.Namespace) -> int:
    from pagetier.handler.top import run_top

    if not arguments.interval > 0:
        raise ConfigError(f"--interval must be above 0, not {arguments.interval}.")
    return run_top(arguments.url, arguments.key, interval_s=arguments.interval, once=arguments.once)


def _chat(arguments: argparse.Namespace) -> int:
    from pagetier.handler.chat import Chat, run_chat
    from pagetier.handler.client import ServedModel

    chat = Chat(
        ServedModel(arguments.url, arguments.key),
        system=arguments.system,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )
    return run_chat(chat, arguments.message)


def _how_to_call(base_url: str, key: str, model: str) -> str:
    body = f'{{"model": "{model}", "prompt": "Return the", "max_tokens": 32, "stream": true}}'
    return (
        f"OpenAI base URL:  {base_url}\n"
        f"API key:          {key or '(none needed)'}\n"
        f"Model:            {model}\n\n"
        f"  curl -N {base_url}/completions \\\n"
        f'    -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\\n'
        f"    -d '{body}'\n\n"
        f'  curl {base_url.removesuffix("/v1")}/stats -H "Authorization: Bearer {key}"\n\n'
        f"  pagetier top {base_url} --key '{key}'\n"
        f"  pagetier chat {base_url} --key '{key}'\n"
    )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)
