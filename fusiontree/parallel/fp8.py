"""Which matrix products of a model are computed in FP8, and whether their sizes allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fusiontree.models.block import FusionBlock
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.mixers.split import split_of
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.dispatch import triton_unavailable
from fusiontree.ops.fp8 import KeptCasts
from fusiontree.ops.fp8.casts import E4M3, E5M2, Recipe
from fusiontree.ops.fp8.linear import Fp8Linear, Fp8Product
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.tensor_parallel import SelectedLinear
from fusiontree.training.config import Fp8Config, TrainingConfig
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

_FIRST_WITH_FP8 = (8, 9)
"""Compute capability."""
MULTIPLE = 16
"""Sizes of FP8 products are multiples of this on NVIDIA GPUs."""
_OF_BLOCK = {
    **{f"align.{name}": "align" for name in ("up", "down", "skip")},
    "out_proj": "out_proj",
    **{f"mlp.{name}": "mlp" for name in ("up", "down", "gate")},
    **{f"gate.{name}": "gate" for name in ("down", "up")},
}
"""Linear maps of a block outside its mixers, and their names in ``training.fp8.exclude``."""


class LinearMap(NamedTuple):
    """A linear map of a block, and the module that has it."""

    owner: nn.Module
    leaf: str
    """Its attribute of ``owner``."""
    name: str
    """In the model."""
    kind: str
    """Name in ``training.fp8.exclude``."""
    module: nn.Linear
    bf16_rows: Callable[[int], int]
    """Returns how many of the last rows stay bf16, given the number of all."""

    @property
    def fp8_rows(self) -> int:
        """Output channels that are computed in FP8."""
        rows = self.module.weight.shape[0]
        return rows - self.bf16_rows(rows)


def use_fp8(model: FusionTreeModel, settings: Fp8Config) -> None:
    """Compute the products that ``settings`` does not exclude in FP8; parameter names do not change.

    Args:
        model: on the meta device, already split over tensor parallel ranks.
        settings: the ``training.fp8`` section.

    Raises:
        UserError: a mixer does not support FP8.
    """
    _check_mixers(model.config, settings)
    recipe = Recipe(settings.scaling, {"e4m3": E4M3, "e5m2": E5M2}[settings.gradient_type])
    for found in linear_maps(model, settings):
        product = Fp8Product(recipe, found.bf16_rows)
        if isinstance(found.module, SelectedLinear):
            found.module.product = product
        else:
            setattr(found.owner, found.leaf, Fp8Linear(found.module, product))


def linear_maps(model: FusionTreeModel, settings: Fp8Config) -> Iterator[LinearMap]:
    """Yield the linear maps to compute in FP8; of a mixer that does not support it, none."""
    excluded = set(settings.exclude)
    for index in _fp8_layers(model.config, settings):
        block = model.layers[index]
        assert isinstance(block, FusionBlock)
        for name, kind in _OF_BLOCK.items():
            if kind not in excluded:
                yield from _map(block, name, f"layers.{index}", kind, lambda rows: 0)
        for module_name, mixer_module in block.mixers().items():
            for name, kind in mixer_module.fp8_products.items():
                if kind not in excluded:
                    bf16_rows = partial(mixer_module.bf16_rows, name)
                    yield from _map(mixer_module, name, f"layers.{index}.{module_name}", kind, bf16_rows)


def _fp8_layers(config: ModelConfig, settings: Fp8Config) -> range:
    """Return the layers that compute products in FP8."""
    return range(settings.first_bf16_layers, config.num_layers - settings.last_bf16_layers)


def _check_mixers(config: ModelConfig, settings: Fp8Config) -> None:
    """Check that the mixers of the layers with FP8 products support them.

    Raises:
        UserError: one does not, and its products are not excluded.
    """
    if {"mixer_in", "mixer_out"} <= set(settings.exclude):
        return
    for layer in _fp8_layers(config, settings):
        for mixer in layer_mixers(config, layer):
            if not mixer.fp8_products:
                exclude = ", ".join(dict.fromkeys([*settings.exclude, "mixer_in", "mixer_out"]))
                raise UserError(
                    f"mixer {mixer.name} of layer {layer} does not support training.matmul_precision fp8 (its "
                    f"fp8_products is empty); set training.fp8.exclude to [{exclude}], keep its layers in bf16 by "
                    f"training.fp8.first_bf16_layers or last_bf16_layers, or set matmul_precision to bf16"
                )


def _map(parent: nn.Module, name: str, prefix: str, kind: str, bf16_rows: Callable[[int], int]) -> Iterator[LinearMap]:
    """Yield the linear map at a dotted name, if ``parent`` has it."""
    before, _, leaf = name.rpartition(".")
    owner = getattr(parent, before) if before else parent
    module = getattr(owner, leaf, None) if owner is not None else None
    if isinstance(module, nn.Linear):
        yield LinearMap(owner, leaf, f"{prefix}.{name}", kind, module, bf16_rows)


def check_fp8(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Check that FP8 products have sizes that GPUs multiply.

    Raises:
        UserError: a mixer does not support FP8, or a size is not a multiple of 16.
    """
    if training.matmul_precision != "fp8":
        return
    settings, layers = training.fp8, model.num_layers
    if not any(fp8_by_layer(model, training) or ()):
        raise UserError(
            f"training.matmul_precision is fp8, and training.fp8 (exclude, first_bf16_layers "
            f"{settings.first_bf16_layers}, last_bf16_layers {settings.last_bf16_layers}) leaves none of the {layers} "
            f"layers a product in FP8; keep less in bf16, or set matmul_precision to bf16"
        )
    if problems := _size_problems(model, training, parallel.tp):
        _, *others = problems
        more = f" (as do products of {', '.join(others)})" if others else ""
        exclude = list(dict.fromkeys([*settings.exclude, *problems]))
        rest = training.model_copy(update={"fp8": settings.model_copy(update={"exclude": exclude})})
        way_out = (
            f"set training.fp8.exclude to [{', '.join(exclude)}], or " if any(fp8_by_layer(model, rest) or ()) else ""
        )
        first = next(iter(problems.values()))
        raise UserError(f"training.matmul_precision fp8: {first}{more}; {way_out}set matmul_precision to bf16")
    ranks = parallel.cp * parallel.tp
    for name, length in training.row_lengths.items():
        if length // ranks % MULTIPLE:
            raise UserError(
                f"training.matmul_precision fp8 needs a multiple of {MULTIPLE} tokens of a row on each rank, and "
                f"{name} {length} over parallel.cp {parallel.cp} x parallel.tp {parallel.tp} ranks is "
                f"{length // ranks}; use a multiple of {MULTIPLE * ranks}, or training.matmul_precision bf16"
            )


def check_device(device: torch.device, announce: bool = True) -> None:
    """Check that a device computes FP8 products; a CPU computes the same values slowly.

    Args:
        device: of this rank.
        announce: warn of a CPU; one rank does.

    Raises:
        UserError: the GPU has no FP8 products, or Triton, whose kernels cast, is not installed.
    """
    if device.type != "cuda":
        if announce:
            log.warning("training.matmul_precision fp8 on the CPU: products of FP8 values are computed in fp32")
        return
    capability = torch.cuda.get_device_capability(device)
    problem = triton_unavailable(device)
    if capability < _FIRST_WITH_FP8:
        problem = f"{torch.cuda.get_device_name(device)} has no FP8 products (compute capability {capability})"
    if problem:
        raise UserError(f"training.matmul_precision fp8: {problem}; set it to bf16")


def _size_problems(model: ModelConfig, training: TrainingConfig, tp: int) -> dict[str, str]:
    """Return what is wrong with the first weight of each kind whose sizes on a rank are not multiples of 16."""
    with torch.device("meta"):
        module = FusionTreeModel(model)
    problems: dict[str, str] = {}
    for found in linear_maps(module, training.fp8):
        rows, columns = found.module.weight.shape
        split = split_of(f"{found.name}.weight", model) if tp > 1 else None
        if split is not None:
            local = sum(stop - start for start, stop in split.ranges(0, tp))
            rows, columns = (local, columns) if split.axis == 0 else (rows, local)
        rows -= found.bf16_rows(rows)
        if rows % MULTIPLE or columns % MULTIPLE:
            over = f" on one of parallel.tp {tp} ranks" if split is not None else ""
            sizes = f"a matrix of {rows} x {columns}{over}, not multiples of {MULTIPLE}"
            problems.setdefault(found.kind, f"{found.name} ({found.kind}) multiplies by {sizes}")
    return problems


def fp8_by_layer(model: ModelConfig, training: TrainingConfig) -> list[int] | None:
    """Return for each layer the number of parameters whose products are computed in FP8; None if all are in bf16.

    Raises:
        UserError: a mixer does not support FP8.
    """
    if training.matmul_precision != "fp8":
        return None
    _check_mixers(model, training.fp8)
    with torch.device("meta"):
        module = FusionTreeModel(model)
    counts = [0] * model.num_layers
    for found in linear_maps(module, training.fp8):
        counts[int(found.name.split(".")[1])] += found.fp8_rows * found.module.in_features
    return counts


def keep_casts(model: nn.Module, in_place: set[str]) -> list[KeptCasts]:
    """Let the casts of weights be kept until they are marked as invalid; return the casts.

    Args:
        model: after :func:`use_fp8`.
        in_place: names of parameters whose memory stays; an engine that gathers a weight for each pass casts it anew.
    """
    kept = []
    for name, module in model.named_modules():
        product = getattr(module, "product", None)
        if isinstance(product, Fp8Product) and f"{name}.weight" in in_place:
            product.kept = KeptCasts()
            kept.append(product.kept)
    return kept
