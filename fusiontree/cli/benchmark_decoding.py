"""Measures decoding and prefills on one GPU: ``fusiontree benchmark-decoding --config FILE [section.key=value …]``.

The model has random weights. Prints a table line by line, and last all figures as one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import run_program
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fusiontree.models.config import ModelConfig
    from fusiontree.models.model import FusionTreeModel

PEERS = ("falcon", "export")
Figures = dict[str, Any]


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
    prefill = "tokens of the timed prefill (default 131072; 0: none)"
    add("--prefill", type=int, default=131072, metavar="N", help=prefill)
    add("--prefill-chunk", type=int, default=16384, metavar="N", help="tokens per forward of a prefill (default 16384)")
    weights = "format of the projections' weights (default bf16)"
    add("--weights", nargs="+", default=["bf16"], choices=["bf16", "int8", "fp8"], help=weights)
    steps = "recorded steps to time: the fused step, the model's ordinary forward (default both)"
    add("--steps", nargs="+", default=["fused", "forward"], choices=["fused", "forward"], help=steps)
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

    for name in ("context", "tokens", "prefill_chunk", *(() if args.prefill == 0 else ("prefill",))):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1 token")
    if min(args.rows) < 1:
        raise UserError(f"--rows {min(args.rows)} must be at least 1")
    config = load_config(args.config, args.overrides).model
    device = gpu()
    ids_1S = torch.randint(config.vocab_size, (1, args.context), generator=torch.Generator().manual_seed(0)).to(device)
    name = torch.cuda.get_device_name(device)
    print(f"{args.config}, {args.context:,} tokens of context, one {name}, torch {torch.__version__}", flush=True)
    print(line("measured", "weights", "tokens/s", "bound", "of bound", "ms/step", "peak GiB"), flush=True)
    found: list[Figures] = []
    for figures in everything(args, config, ids_1S, device):
        found.append(figures)
        show(figures)
    print(json.dumps({"config": args.config, "device": name, "torch": torch.__version__, "figures": found}))
    return 1 if any("error" in figures for figures in found) else 0


def gpu() -> torch.device:
    """Return the GPU.

    Raises:
        UserError: there is none.
    """
    from fusiontree.utils.device import choose_device

    device = choose_device("auto")
    if device.type != "cuda":
        raise UserError("benchmark-decoding times a GPU, and none is visible here; run it on a machine with a GPU")
    return device


def everything(
    args: argparse.Namespace, config: ModelConfig, ids_1S: Tensor, device: torch.device
) -> Iterator[Figures]:
    """Yield the figures of one measurement after the other; a failed measurement does not end the others."""
    base = guarded(lambda: {"model": random_model(config)})
    for kind in args.weights:
        if "error" in base:
            yield {"measured": "random weights", "weights": kind} | base
            continue
        yield from measure(args, base["model"], kind, ids_1S, device)
    del base
    for name in args.peers:
        figures = guarded(partial(peer, name, config, ids_1S, device, args.tokens))
        yield {"measured": f"{name} (transformers), 1 row", "weights": "bf16", "rows": 1} | figures


def measure(
    args: argparse.Namespace, base: FusionTreeModel, kind: str, ids_1S: Tensor, device: torch.device
) -> Iterator[Figures]:
    """Yield the figures of the prefill and of decoding with weights of one format."""
    import torch

    from fusiontree.benchmarking.decoding import decoded_rates, prefill_rate
    from fusiontree.models.fused_step import prepare

    def decode(model: FusionTreeModel, steps: str, rows: int) -> Figures:
        if steps == "fused":
            prepare(model)
        else:
            model.fused_step = None
        with torch.inference_mode():
            return decoded_rates(model, ids_1S, rows, args.tokens, prefill_chunk=args.prefill_chunk)

    def prefill(model: FusionTreeModel) -> Figures:
        with torch.inference_mode():
            return prefill_rate(model, args.prefill, prefill_chunk=args.prefill_chunk)

    loaded = guarded(lambda: {"model": on_gpu(base, kind, device)})
    if "error" in loaded:
        yield {"measured": f"{kind} weights", "weights": kind} | loaded
        return
    model = loaded["model"]
    for steps in args.steps:
        for rows in args.rows:
            figures = guarded(partial(decode, model, steps, rows))
            name = f"decoding, {rows} row{'s' if rows > 1 else ''}, {steps}"
            yield {"measured": name, "weights": kind, "steps": steps, "rows": rows} | figures
    if args.prefill:
        name = f"prefill of {args.prefill:,} in chunks of {args.prefill_chunk:,}"
        yield {"measured": name, "weights": kind} | guarded(lambda: prefill(model))


def random_model(config: ModelConfig) -> FusionTreeModel:
    """Return a bf16 model with random weights on the CPU."""
    import torch

    from fusiontree.models.initialization import initialize_model
    from fusiontree.models.model import FusionTreeModel

    with torch.device("meta"):
        model = FusionTreeModel(config)
    model.to_empty(device="cpu")
    initialize_model(model, 0)
    return model.bfloat16().eval()


def on_gpu(base: FusionTreeModel, kind: str, device: torch.device) -> FusionTreeModel:
    """Return a copy of ``base`` on ``device`` with weights in the format ``kind``."""
    from fusiontree.models.weight_only import quantize_weights

    model = copy.deepcopy(base).to(device)
    if kind in ("int8", "fp8"):
        quantize_weights(model, kind)  # type: ignore[arg-type]
    return model


def peer(name: str, config: ModelConfig, ids_1S: Tensor, device: torch.device, tokens: int) -> Figures:
    """Return the figures of another implementation: one row, eager steps.

    Raises:
        UserError: transformers is missing, or the exported code lacks a mixer of the model.
    """
    import torch

    from fusiontree.benchmarking import peers

    if lacking := peers.falcon_missing():
        raise UserError(f"peer {name} cannot run here: {lacking}")
    if name == "falcon":
        return peers.decode_falcon(config, ids_1S, device, tokens=tokens)
    from fusiontree.convert import hf
    from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig
    from fusiontree.convert.hf_model.modeling_fusiontree import FusionTreeCache, FusionTreeForCausalLM

    hf.check_mixers(config)
    with device:
        model: Any = FusionTreeForCausalLM(FusionTreeConfig(**hf.settings(config)))
    model.to(torch.bfloat16).eval()
    torch.cuda.reset_peak_memory_stats()
    cache = FusionTreeCache(config.num_layers, peers.columns_to_decode(ids_1S.shape[1], tokens))
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode():
        state = model(input_ids=ids_1S, **options).logits
        step = lambda state: model(input_ids=state[:, -1:].argmax(-1), **options).logits  # noqa: E731
        return {"steps": "eager, static cache", **peers.timed_decoding(state, step, 1, tokens)}


def guarded(work: Callable[[], Figures]) -> Figures:
    """Return the figures, or an ``error``: work that does not fit into memory, or fails, must not end the others."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def show(figures: Figures) -> None:
    """Print the figures as a line of the table."""
    name, weights = figures["measured"], figures["weights"]
    if "error" in figures:
        print(line(name, weights, f"failed: {' '.join(figures['error'].split())[:400]}"), flush=True)
        return
    if "tokens_per_s" not in figures:
        return
    rate, bound = figures["tokens_per_s"], figures.get("bound")
    beside = (f"{bound:,.0f}", f"{figures['share']:.0%}") if bound else ("", "")
    step = f"{1e3 * figures['rows'] / rate:.2f}" if "rows" in figures else ""
    peak = f"{figures['peak_memory_gib']:.1f}"
    if "activations_gib" in figures:
        peak += f", {figures['activations_gib']:.1f} beyond weights and cache"
    print(line(name, weights, f"{rate:,.0f}", *beside, step, peak), flush=True)


def line(name: str, weights: str, *columns: str) -> str:
    """Return the columns in their widths."""
    return f"{name:44} {weights:8}" + "".join(f" {text:>9}" for text in columns)


if __name__ == "__main__":
    sys.exit(main())
