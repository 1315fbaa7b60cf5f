"""``python tools/fp8_errors.py --config FILE``: errors of every product of a model in bf16 and FP8 against fp32.

Runs forward and backward of one micro-batch in bf16. Each linear map of the blocks is computed again from its input,
its weight and the gradient of its output: output, input gradient and weight gradient, in every precision.

Shape legend: N tokens, C input channels, D output channels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.checkpoint.load import load_model
from fusiontree.cli.program import run_program
from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.data.loader import TrainingData
from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.fp8 import Outputs, fp8_linears
from fusiontree.ops.fp8.casts import E4M3, E5M2, Recipe
from fusiontree.parallel.batch_sharding import shard_inputs
from fusiontree.parallel.fp8 import linear_maps
from fusiontree.training.config import Fp8Config
from fusiontree.utils.device import choose_device
from fusiontree.utils.errors import UserError

RECIPES = {
    "fp8 tensor e4m3": Recipe("tensor", E4M3),
    "fp8 tensor e5m2": Recipe("tensor", E5M2),
    "fp8 row e4m3": Recipe("row", E4M3),
    "fp8 row e5m2": Recipe("row", E5M2),
}
RESULTS = ("output", "input gradient", "weight gradient")


class Errors(NamedTuple):
    """Errors of one product: the norm of the difference from fp32 over the norm of fp32's result."""

    name: str
    """Of the linear map in the model."""
    result: str
    """One of ``RESULTS``."""
    outlier: float
    """Greatest root mean square of a channel of the factor that differs by token, over that of all channels."""
    by_precision: dict[str, float]


def product_errors(name: str, x_NC: Tensor, weight_DC: Tensor, grad_ND: Tensor) -> list[Errors]:
    """Return the errors of a linear map's three products.

    Args:
        name: of the linear map.
        x_NC: its input, bf16.
        weight_DC: its weight, bf16.
        grad_ND: gradient of its output, bf16.
    """
    exact = _products(x_NC.float(), weight_DC.float(), grad_ND.float())
    found = {"bf16": _products(x_NC, weight_DC, grad_ND)}
    for precision, recipe in RECIPES.items():
        x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x_NC, weight_DC))
        with torch.enable_grad():
            (output,) = fp8_linears(x, [weight], [Outputs((weight.shape[0],))], recipe)
            found[precision] = [output.detach(), *torch.autograd.grad(output, (x, weight), grad_ND)]
    outliers = (_outlier(x_NC), _outlier(grad_ND), max(_outlier(x_NC), _outlier(grad_ND)))
    return [
        Errors(name, result, outliers[index], {key: _error(value[index], exact[index]) for key, value in found.items()})
        for index, result in enumerate(RESULTS)
    ]


def _products(x_NC: Tensor, weight_DC: Tensor, grad_ND: Tensor) -> list[Tensor]:
    return [x_NC @ weight_DC.t(), grad_ND @ weight_DC, grad_ND.t() @ x_NC]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm().clamp(min=1e-30))


def _outlier(matrix: Tensor) -> float:
    squares = matrix.float().square().mean(0)
    return float((squares.max() / squares.mean().clamp(min=1e-30)).sqrt())


def measure(model: FusionTreeModel, inputs: Any) -> list[Errors]:
    """Return the errors of all linear maps of the blocks, including those that training computes in bf16.

    Args:
        model: in bf16.
        inputs: a :class:`ModelInputs` with labels, on the model's device.
    """
    found: list[Errors] = []
    handles = []
    for its in linear_maps(model, Fp8Config(exclude=[])):

        def watch(module: Any, given: tuple[Tensor], output: Tensor, its: Any = its) -> None:
            rows = module.weight.shape[0] - its.bf16_rows(module.weight.shape[0])
            x_NC, weight = given[0].detach().flatten(0, -2), module.weight.detach()[:rows]
            name = f"{its.name} ({its.kind})"

            def compare(grad: Tensor) -> None:
                found.extend(product_errors(name, x_NC, weight, grad.flatten(0, -2)[:, :rows]))

            output.register_hook(compare)

        handles.append(its.module.register_forward_hook(watch))
    loss_sum = model(**inputs._asdict()).loss_sum
    assert loss_sum is not None, "inputs have labels"
    (loss_sum / inputs.labels_BS.numel()).backward()
    for handle in handles:
        handle.remove()
    return found


def table(errors: Sequence[Errors]) -> Iterator[str]:
    """Yield one line per kind of linear map and result: the mean errors over the layers, and the greatest outlier."""
    precisions = ["bf16", *RECIPES]
    yield f"{'product':<44}{'outlier':>8}" + "".join(f"{precision:>17}" for precision in precisions)
    groups: dict[tuple[str, str], list[Errors]] = {}
    for its in errors:
        kind = ".".join(part for part in its.name.split(".") if not part.isdigit()).removeprefix("layers.")
        groups.setdefault((kind, its.result), []).append(its)
    for (kind, result), members in sorted(groups.items()):
        means = (sum(m.by_precision[p] for m in members) / len(members) for p in precisions)
        shown = "".join(f"{mean:>17.2e}" for mean in means)
        yield f"{kind + ', ' + result:<44}{max(m.outlier for m in members):>8.1f}{shown}"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Errors of matrix products in bf16 and FP8 against fp32.")
    model = "YAML file: the model (unless --checkpoint), the data and the length of a row"
    parser.add_argument("--config", required=True, metavar="FILE", help=model)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--checkpoint", type=Path, help="run or checkpoint folder (default: initial weights)")
    parser.add_argument("--output", type=Path, help="JSON file for the errors of every layer")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit code, 2 for a user's mistake."""
    return run_program(build_parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    device = choose_device(config.training.device, 0, "training.device")
    errors = measure(_model(config, args.checkpoint, device), _inputs(config).to(device))
    for line in table(errors):
        print(line)
    if args.output:
        args.output.write_text(json.dumps([its._asdict() for its in errors], indent=1))
    return 0


def _model(config: Config, checkpoint: Path | None, device: torch.device) -> FusionTreeModel:
    if checkpoint is not None:
        return load_model(checkpoint, device, torch.bfloat16)[0].train().requires_grad_(True)
    model = FusionTreeModel(config.model)
    initialize_model(model, config.training.seed)
    return model.to(device, torch.bfloat16)


def _inputs(config: Config) -> Any:
    training = config.training
    data = TrainingData(config.data, training, config.model.vocab_size, 0, 1)
    for batch, _ in data.steps():
        return shard_inputs(batch.micro_batches[0], None, (), None)
    raise UserError(f"{config.data.train} has no row of {training.seq_len} tokens; shorten training.seq_len")
