"""Peers and decoding, timed after our training."""

from __future__ import annotations

import gc
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fusiontree.benchmarking import peers
from fusiontree.benchmarking.table import print_others
from fusiontree.config.root import Config
from fusiontree.data.batch import MicroBatch
from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel

log = logging.getLogger(__name__)

Measure = Callable[[], dict[str, Any]]


def falcon_and_decoding(
    config: Config, args: Namespace, micro: MicroBatch, mesh: Any, device: torch.device
) -> dict[str, Measure]:
    """Return what ``args`` ask for of Falcon-H1's training, our decoding and Falcon-H1's, on ``micro``."""
    ids_BS = micro.input_ids_BS[:1]
    given = (config.model, micro.input_ids_BS, micro.labels_BS, mesh, device)
    found: dict[str, Measure] = {}
    if "falcon" in args.peers:
        found["falcon_h1"] = partial(peers.train_falcon, *given, steps=args.steps, warmup=args.warmup)
    if args.decode:
        found["decode"] = partial(_our_decoding, config, ids_BS, device, args.decode)
    if args.decode and "falcon" in args.peers:
        found["falcon_h1_decode"] = partial(peers.decode_falcon, config.model, ids_BS, device, tokens=args.decode)
    return found


def time_others(
    wanted: Mapping[str, Measure], ours: Mapping[str, Any], *, show: bool = True, alone: bool = True
) -> dict[str, Any]:
    """Measure and print one after the other; a failed one has an ``error``.

    A peer that does not fit this device must not lose the figures of our training, which was timed before.

    Args:
        wanted: by name.
        ours: figures of our training; a peer's training gets the ratios to them.
        show: print the figures.
        alone: this is the only process; among several, a failed one ends all.
    """
    found: dict[str, Any] = {}
    for name, measure in wanted.items():
        try:
            gc.collect()
            torch.cuda.empty_cache()
            found[name] = measure()
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one
            if not alone:
                raise
            log.warning("%s failed", name, exc_info=True)
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        if "model_tflops_per_gpu" in found[name]:
            speed = found[name]["tokens_per_s_per_gpu"]
            found[name]["ours_over_peer_tokens"] = ours["tokens_per_s_per_gpu"] / speed
            useful = ours["model_tflops_per_gpu"] / found[name]["model_tflops_per_gpu"]
            found[name]["ours_over_peer_useful_flops"] = useful
        if show:
            print_others({name: found[name]})
    return found


def _our_decoding(config: Config, ids_BS: torch.Tensor, device: torch.device, tokens: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = FusionTreeModel(config.model)
    model.to_empty(device=device)
    initialize_model(model, config.training.seed)
    return peers.decode_ours(model.bfloat16().eval(), ids_BS, device, tokens=tokens)
