"""``python tools/fp8_errors.py --checkpoint RUN``: errors of every product of a model in bf16 and FP8 against fp32.

With ``--config FILE``, the data and the length of a row are those of the file; without ``--checkpoint``, the model has
its initial weights. Runs forward and backward of one micro-batch in bf16. Each linear map of the blocks is computed
again from its input, its weight and the gradient of its output: output, input gradient and weight gradient, in every
precision.

Shape legend: N tokens, C input channels, D output channels.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.checkpoint.load import find_checkpoint, load_model, read_state
from fusiontree.cli.program import check_output_folders, run_program
from fusiontree.config.load import apply_overrides, build_config, load_config
from fusiontree.config.root import Config
from fusiontree.data.loader import TrainingData
from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.fp8 import Outputs, fp8_linears
from fusiontree.ops.fp8.casts import E4M3, E5M2, Recipe
from fusiontree.parallel.batch_sharding import shard_inputs
from fusiontree.parallel.fp8 import MULTIPLE, linear_maps
from fusiontree.training.config import Fp8Config, TrainingConfig
from fusiontree.utils.device import choose_device
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_output

log = logging.getLogger(__name__)

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

    Mixers that do not support FP8 are left out, as are, on a GPU, maps whose sizes are not multiples of 16; the
    latter are named in a warning.

    Args:
        model: in bf16.
        inputs: a :class:`ModelInputs` with labels, on the model's device.
    """
    found: list[Errors] = []
    handles = []
    for its in linear_maps(model, Fp8Config(exclude=[])):
        if refused := size_problem(its.name, its.fp8_rows, its.module.in_features, its.module.weight.device):
            log.warning("left out: %s", refused)
            continue

        def watch(module: Any, given: tuple[Tensor], output: Tensor, its: Any = its) -> None:
            rows = its.fp8_rows
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
    model = "YAML file: the model (unless --checkpoint), the data and the length of a row (default: the checkpoint's)"
    parser.add_argument("--config", metavar="FILE", help=model)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--checkpoint", type=Path, help="run or checkpoint folder (default: initial weights of --config)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the errors of every layer")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit code, 2 for a user's mistake."""
    return run_program(build_parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    check_output_folders(args, "output")
    config = _config(args)
    device = choose_device(config.training.device, 0, "training.device")
    check_length(config.training, device)
    model = _model(config, args.checkpoint, device)
    errors = measure(model, _inputs(config, model.config.vocab_size).to(device))
    for line in table(errors):
        print(line)
    if args.output:
        write_output(args.output, json.dumps([its._asdict() for its in errors], indent=1) + "\n")
    return 0


def size_problem(name: str, rows: int, columns: int, device: torch.device) -> str | None:
    """Return why ``device`` cannot multiply by a weight in FP8, or None; a CPU multiplies every size."""
    if device.type == "cpu" or not (rows % MULTIPLE or columns % MULTIPLE):
        return None
    return f"{name} multiplies by a matrix of {rows} x {columns}, and GPUs need multiples of {MULTIPLE}"


def check_length(training: TrainingConfig, device: torch.device) -> None:
    """Check that the tokens of the first rows are a multiple of 16, which GPUs need.

    Raises:
        UserError: they are not.
    """
    name, length = "training.seq_len", training.seq_len
    if training.curriculum:
        name, length = "stage 0 of training.curriculum", training.curriculum[0][0]
    if device.type != "cpu" and length % MULTIPLE:
        raise UserError(
            f"FP8 products on a GPU need rows of a multiple of {MULTIPLE} tokens, and {name} is {length}; give "
            f"training.curriculum=null training.seq_len={-(-length // MULTIPLE) * MULTIPLE}"
        )


def _config(args: argparse.Namespace) -> Config:
    """Return the file's configuration, or that which the checkpoint was trained with."""
    if args.config is not None:
        return load_config(args.config, args.overrides)
    if args.checkpoint is None:
        raise UserError("give --config FILE, --checkpoint RUN, or both")
    folder = find_checkpoint(args.checkpoint)
    values = read_state(folder)["config"]
    if not {"training", "data"} <= values.keys():
        raise UserError(
            f"checkpoint '{folder}' does not say with which data it was trained; give them by --config FILE"
        )
    return build_config(apply_overrides(values, args.overrides), f"configuration of '{folder}'")


def _model(config: Config, checkpoint: Path | None, device: torch.device) -> FusionTreeModel:
    if checkpoint is not None:
        return load_model(checkpoint, device, torch.bfloat16)[0].train().requires_grad_(True)
    model = FusionTreeModel(config.model)
    initialize_model(model, config.training.seed)
    return model.to(device, torch.bfloat16)


def _inputs(config: Config, vocab_size: int) -> Any:
    data = TrainingData(config.data, config.training, vocab_size, 0, 1)
    with closing(data.steps()) as steps:
        batch, _ = next(steps)
    return shard_inputs(batch.micro_batches[0], None, (), None)
