"""Measures decoding and prefills on one GPU: ``fusiontree benchmark-decoding --config FILE [section.key=value …]``.

The model has random weights. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import run_program
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fusiontree.models.config import ModelConfig
    from fusiontree.models.model import FusionTreeModel

PEERS = ("falcon", "export")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.cli.benchmark_decoding",
        description="Tokens per second of decoding and of prefills on one GPU, beside the bound by memory bandwidth.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file whose model section is measured")
    add("--context", type=int, default=32768, metavar="N", help="tokens before the decoded tokens (default 32768)")
    add("--rows", type=int, nargs="+", default=[1, 32], metavar="N", help="rows decoded together (default 1 and 32)")
    add("--tokens", type=int, default=256, metavar="N", help="timed tokens per row (default 256)")
    add(
        "--prefill", type=int, default=131072, metavar="N", help="tokens of the timed prefill (default 131072; 0: none)"
    )
    add("--prefill-chunk", type=int, default=16384, metavar="N", help="tokens per forward of a prefill (default 16384)")
    weights = "format of the projections' weights (default bf16)"
    add("--weights", nargs="+", default=["bf16"], choices=["bf16", "int8", "fp8"], help=weights)
    add("--no-fuse", action="store_true", help="record the model's forward instead of the fused step")
    peers = "also decode one row with Falcon-H1 of these sizes, and with our exported model, through transformers"
    add("--peers", nargs="+", default=[], choices=PEERS, help=peers)
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 if a measurement failed, 2 if something the user gave is wrong."""
    return run_program(build_parser, command, argv)


def command(args: argparse.Namespace) -> int:
    """Measure and print; return the exit code of :func:`main`.

    Raises:
        UserError: an option is wrong, or there is no GPU.
    """
    import torch

    from fusiontree.config.load import load_config
    from fusiontree.utils.device import choose_device

    for name in ("context", "tokens", "prefill_chunk", *(() if args.prefill == 0 else ("prefill",))):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1 token")
    if min(args.rows) < 1:
        raise UserError(f"--rows {min(args.rows)} must be at least 1")
    config = load_config(args.config, args.overrides).model
    device = choose_device("auto")
    if device.type != "cuda":
        raise UserError("benchmark-decoding times a GPU, and none is visible here; run it on a machine with a GPU")
    ids_1S = torch.randint(config.vocab_size, (1, args.context), generator=torch.Generator().manual_seed(0)).to(device)
    result: dict[str, Any] = {"config": args.config, "device": torch.cuda.get_device_name(device), "decoding": []}
    with torch.inference_mode():
        for kind in args.weights:
            for figures in measure(args, config, kind, ids_1S, device):
                show(result["decoding"], f"{figures.get('measured')}, weights {kind}", figures | {"weights": kind})
        for name in args.peers:
            show(result["decoding"], name, guarded(lambda name=name: peer(name, config, ids_1S, device, args.tokens)))
    print(json.dumps(result))
    return 1 if any("error" in figures for figures in result["decoding"]) else 0


def measure(
    args: argparse.Namespace, config: ModelConfig, kind: str, ids_1S: Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """Return the figures of all rows and of the prefill with weights of one format."""
    from fusiontree.benchmarking.decoding import decoded_rates, prefill_rate
    from fusiontree.models.fused_step import prepare

    model = random_model(config, kind, device)
    if not args.no_fuse:
        prepare(model)
    chunk, found = args.prefill_chunk, []
    for rows in args.rows:
        figures = guarded(lambda rows=rows: decoded_rates(model, ids_1S, rows, args.tokens, prefill_chunk=chunk))
        found.append({"measured": f"decoding {rows} rows", **figures})
    if args.prefill:
        figures = guarded(lambda: prefill_rate(model, args.prefill, prefill_chunk=chunk))
        found.append({"measured": "prefill", **figures})
    return found


def random_model(config: ModelConfig, kind: str, device: torch.device) -> FusionTreeModel:
    """Return a bf16 model with random weights in the format ``kind``."""
    import torch

    from fusiontree.models.initialization import initialize_model
    from fusiontree.models.model import FusionTreeModel
    from fusiontree.models.weight_only import quantize_weights

    with torch.device("meta"):
        model = FusionTreeModel(config)
    model.to_empty(device=device)
    initialize_model(model, 0)
    model.bfloat16().eval()
    if kind in ("int8", "fp8"):
        quantize_weights(model, kind)  # type: ignore[arg-type]
    return model


def peer(name: str, config: ModelConfig, ids_1S: Tensor, device: torch.device, tokens: int) -> dict[str, Any]:
    """Return the figures of another implementation, one row, eager steps."""
    import torch

    from fusiontree.benchmarking.peers import decode_falcon, timed_decoding

    if name == "falcon":
        return decode_falcon(config, ids_1S, device, tokens=tokens)
    from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig
    from fusiontree.convert.hf_model.modeling_fusiontree import FusionTreeForCausalLM

    values = {key: value for key, value in config.model_dump().items() if key != "kernels"}
    model = FusionTreeForCausalLM(FusionTreeConfig(**values)).to(device, torch.bfloat16).eval()
    options = {"use_cache": True, "logits_to_keep": 1}
    state = model(input_ids=ids_1S, **options)

    def step(state: Any) -> Any:
        return model(input_ids=state.logits[:, -1:].argmax(-1), past_key_values=state.past_key_values, **options)

    return {"steps": "eager", **timed_decoding(state, step, 1, tokens)}


def guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures, or an ``error``: one that does not fit into memory must not lose the others."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    try:
        return measure()
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        return {"error": f"{type(error).__name__}: {error}"}


def show(found: list[dict[str, Any]], name: str, figures: dict[str, Any]) -> None:
    """Keep the figures and print them in a line."""
    found.append({"measured": name} | figures)
    if "error" in figures:
        print(f"  {name}: failed: {figures['error']}", flush=True)
        return
    line = f"  {name}: {figures['tokens_per_s']:,.0f} tokens/s"
    if figures.get("bound"):
        line += f", {figures['share']:.0%} of the {figures['bound']:,.0f} that memory bandwidth allows"
    print(f"{line}, peak memory {figures['peak_memory_gib']:.1f} GiB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
