"""Measures training speed: ``python -m fusiontree.benchmark --config FILE [section.key=value …]``.

Times the trainer's own steps on the configured data (``configs/bench``: synthetic tokens), after a warm-up in which
kernels compile and tune; nothing is saved. MFU counts the FLOPs of the model alone (see ``models/flops.py``). The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fusiontree.benchmarking.breakdown import breakdown, memory_by_kind
from fusiontree.benchmarking.table import length_histogram, print_operations, print_table, spread
from fusiontree.cli.benchmark_options import build_parser, check_options
from fusiontree.cli.program import run_program
from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.parallel.validate import check_layout
from fusiontree.utils import gc_control
from fusiontree.utils.environment import process_place

if TYPE_CHECKING:
    from fusiontree.benchmarking.step_timer import StepTimer
    from fusiontree.engines.base import Engine
    from fusiontree.parallel.layout import Layout
    from fusiontree.training.settings import RunSettings

log = logging.getLogger(__name__)

LLAMA_FIGURES = (
    *("parameters", "documents_per_row", "step_time_s", "step_time_min_s", "step_time_max_s", "tokens_per_s_per_gpu"),
    *("model_flops_per_token", "model_tflops_per_gpu", "mfu", "loss"),
)
"""Figures of our training that the peer's have too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 1 when a peer or decoding failed, 2 when something the user gave is wrong."""
    return run_program(build_parser, command, argv)


def command(args: argparse.Namespace) -> int:
    """Check, measure and print; return the exit code of :func:`main`.

    Raises:
        UserError: something the user gave is wrong.
    """
    place = process_place()
    logging.basicConfig(
        level=logging.INFO if place.is_main else logging.WARNING, format="%(message)s", stream=sys.stdout
    )
    if args.peers:  # settings behind the names
        args.overrides += [word for word in args.peers if "=" in word]
        args.peers = [word for word in args.peers if "=" not in word]
    config = load_config(args.config, args.overrides)
    check_layout(config.model, config.parallel, config.training, place.world_size)
    check_options(config, args)
    result = run(config, args)
    if place.is_main:
        print(json.dumps(result))
    failed = [name for name, figures in result.get("others", {}).items() if "error" in figures]
    return 1 if failed else 0


class Timed(NamedTuple):
    """Training steps that were timed."""

    result: dict[str, Any]
    """Configuration and figures."""
    timer: StepTimer
    engine: Engine


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Time training steps, print the figures and return them."""
    from fusiontree.parallel.layout import Layout

    model, training, parallel = config.model, config.training, config.parallel
    with Layout(training.device, tp=parallel.tp, cp=parallel.cp, shard_size=parallel.shard_size) as layout:
        result, timer, engine = _time_training(config, args, layout)
        if layout.device.type == "cuda":
            result |= _on_the_gpu(timer, engine, args.profile if layout.is_main else None)
        gc_control.unfreeze()
        if layout.is_main:  # now, as what follows compiles for minutes
            print_table(result)
            sys.stdout.flush()
        if args.ops:
            from fusiontree.benchmarking.operations import time_operations
            from fusiontree.engines.common import PRECISION

            dtype = PRECISION[training.precision]
            result["operations"] = time_operations(model, training.seq_len, dtype, layout.device)
            if layout.is_main:
                print_operations(result["operations"])
        if args.peers or args.decode:
            from fusiontree.benchmarking.others import falcon_and_decoding, time_others

            micro, mesh = timer.next_micro_batch(), layout.parameter_mesh(True)
            del engine, timer  # their memory is the peer's
            wanted = falcon_and_decoding(config, args, micro, mesh, layout.device)
            if "llama" in args.peers:
                wanted = {"llama": partial(_train_llama, config, args, layout, result["parameters"]), **wanted}
            result["others"] = time_others(wanted, result, show=layout.is_main, alone=layout.place.world_size == 1)
        return result


def _time_training(config: Config, args: argparse.Namespace, layout: Layout) -> Timed:
    """Time steps of training; the caller unfreezes the garbage collection."""
    import torch

    from fusiontree.benchmarking.step_timer import StepTimer
    from fusiontree.cli.run_teacher import add_teacher
    from fusiontree.data.loader import TrainingData
    from fusiontree.engines.build import build_engine
    from fusiontree.models.flops import training_flops_per_token
    from fusiontree.training.settings import RunSettings
    from fusiontree.utils.device import peak_flops

    model, training = config.model, config.training
    at_full_length = training.model_copy(update={"curriculum": None})
    data = TrainingData(config.data, at_full_length, model.vocab_size, layout.dp_rank, layout.dp_size)
    engine = build_engine(model, config.parallel, training, layout)
    teacher = add_teacher(config, layout, engine, data)
    settings = RunSettings(
        config=config,
        values={},
        flops_per_token=partial(training_flops_per_token, model),
        peak_flops=peak_flops(layout.device, training.precision),
    )
    timer = StepTimer(settings, engine, data, one_document=args.one_document)
    engine.checkpointing.announce = log.info
    began = time.perf_counter()
    timer.run(args.warmup)
    gc_control.freeze()
    warmup_s = time.perf_counter() - began
    if layout.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = timer.run(args.steps)
    # Other dp ranks read other documents; of the ranks that share rows one counts.
    mine = times.document_lengths if layout.cp_rank == layout.tp_rank == 0 else []
    lengths = [length for text in layout.gather_text(json.dumps(mine)) for length in json.loads(text)]
    result = _figures(config, args, settings, layout, engine, times.seconds, lengths)
    places = [source.place for source in data.sources]
    result |= {"data": places, "warmup_s": warmup_s, "grad_norm": times.grad_norm, "loss": times.loss}
    result["teacher"] = str(teacher.folder) if teacher else None
    return Timed(result, timer, engine)


def _train_llama(config: Config, args: argparse.Namespace, layout: Layout, parameters: int) -> dict[str, Any]:
    """Time training of a Llama of ``parameters`` parameters on the batches that our training read."""

    from fusiontree.benchmarking.llama import llama_config
    from fusiontree.utils.cuda_graph import peak_memory

    model, training = llama_config(config.model, parameters), config.training
    if training.recompute_layers is not None:  # the same share of the layers
        layers = round(training.recompute_layers * model.num_layers / config.model.num_layers)
        training = training.model_copy(update={"recompute_layers": layers})
    config = config.model_copy(update={"model": model, "training": training})
    figures, timer, engine = _time_training(config, args, layout)
    found = {"name": "Llama", "layers": model.num_layers, "mlp_size": model.mlp_size}
    if layout.device.type == "cuda":
        found["peak_memory_gib"] = peak_memory(engine.device) / 2**30
        found["idle_ms"] = breakdown(partial(timer.run, 1), partial(_wait_for_all, engine), None)["idle"]
    gc_control.unfreeze()
    return found | {name: figures[name] for name in LLAMA_FIGURES}


def _figures(
    config: Config,
    args: argparse.Namespace,
    settings: RunSettings,
    layout: Layout,
    engine: Engine,
    times: list[float],
    lengths: list[int],
) -> dict[str, Any]:
    """Return the timed configuration, its speed, and the lengths of the timed documents."""
    import torch

    training = config.training
    seconds = sorted(times)[len(times) // 2]
    tokens = training.global_batch_size * training.seq_len
    per_gpu = tokens / seconds / layout.place.world_size
    flops, peak = settings.flops_per_token(lengths), settings.peak_flops
    parameters = (t.numel() for name, t in engine.state_tensors().items() if name.startswith("model."))
    return {
        "config": args.config,
        "overrides": args.overrides,
        "device": torch.cuda.get_device_name() if layout.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "world_size": layout.place.world_size,
        "engine": config.parallel.engine,
        "matmul_precision": training.matmul_precision,
        "engine_class": type(engine).__name__,
        "layout": {"dp": layout.dp_size, "cp": layout.cp_size, "tp": layout.tp_size},
        "recompute": engine.checkpointing.summary(),
        "parameters": sum(parameters),
        "seq_len": training.seq_len,
        "rows_per_pass": min(training.micro_batch_size, -(-training.global_batch_size // layout.dp_size)),
        "documents_per_row": len(lengths) * training.seq_len / sum(lengths),
        "document_tokens": spread(lengths),
        "document_histogram": length_histogram(lengths),
        "step_time_s": seconds,
        "step_time_min_s": min(times),
        "step_time_max_s": max(times),
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_gpu": per_gpu,
        "model_flops_per_token": flops,
        "model_tflops_per_gpu": per_gpu * flops / 1e12,
        "mfu": per_gpu * flops / peak if peak else None,
    }


def _on_the_gpu(timer: StepTimer, engine: Engine, trace: str | None) -> dict[str, Any]:
    """Return memory and where the time of one profiled step goes; writes the trace to a file if one is named."""
    import torch

    from fusiontree.utils.cuda_graph import peak_memory

    result: dict[str, Any] = {
        "peak_memory_gib": peak_memory(engine.device) / 2**30,
        "reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30,
    }

    result["breakdown_ms"] = breakdown(partial(timer.run, 1), partial(_wait_for_all, engine), trace)
    result["memory_gib"] = memory_by_kind(engine.state_tensors(), result["peak_memory_gib"])
    return result


def _wait_for_all(engine: Engine) -> None:
    import torch

    engine.barrier()
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
