"""Compares the logits of a FusionTree model with those of transformers, on a fixed prompt.

Hashes verify the weights; this check verifies that an exported folder's code computes the trained model, and that a
model filled from another library's weights computes what the original does. Each model is loaded into memory
completely, one after another, so large models are compared only on request.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fusiontree.convert.reader import MODEL, CheckpointSource, Original, Stream
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.device import available_memory
from fusiontree.utils.environment import child_environment
from fusiontree.utils.errors import UserError

TOLERANCE = 1e-5
"""Largest difference of two logits, as a share of the largest logit (at least 1)."""

ORIGINAL_TOLERANCE = 1e-4
"""The same for a model filled from another library's weights, whose operations are others."""

LARGEST = 4 << 30
"""Maximum bytes of fp32 weights for which ``auto`` compares logits."""

_TOKENS = 256

_ROUNDINGS, _MOST = 4, 1e-2
"""For deep models with rounding errors above the tolerance: allow ``_ROUNDINGS`` times the FusionTree model's rounding
error, at most ``_MOST``."""

_TRANSFORMERS_PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM

folder, ids_file, logits_file, own_code = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code == "yes", dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids_file, weights_only=True), use_cache=False).logits.float(), logits_file)
"""
"""Writes the logits that a folder's own code or transformers computes on the CPU; runs in a process without FusionTree.
"""


def reason_to_skip(source: CheckpointSource, mode: str) -> str | None:
    """Return the reason why logits will not be compared, or None if they will.

    Args:
        source: of the exported model.
        mode: auto | on | off.

    Raises:
        UserError: ``mode`` is on and the logits cannot be compared.
    """
    if mode == "off":
        return "--check-logits off"
    reason = None if source.original is None else _reason_of_original(source.original, mode)
    if reason is None and importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed; pip install 'fusiontree[hf]' brings it"
    weight_bytes = 4 * sum(math.prod(shape) for name, (shape, _) in source.entries.items() if name.startswith(MODEL))
    free = available_memory()
    if reason is None and free is not None and free < 2.5 * weight_bytes:
        reason = f"that takes {2.5 * weight_bytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    if reason is not None and mode == "on":
        raise UserError(f"--check-logits on: {reason}; leave it out to go without")
    if reason is None and mode == "auto" and weight_bytes > LARGEST:
        reason = f"the model takes {weight_bytes / 1e9:.1f} GB in fp32; --check-logits on compares it all the same"
    return reason


def _reason_of_original(original: Original, mode: str) -> str | None:
    """Return why a filled model is not compared with its original, or None."""
    if original.differences:
        return f"the new model does not compute what the source does: {'; '.join(original.differences)}"
    if original.folder is None:
        return "the source is no folder with a config.json"
    if not original.exact and mode != "on":
        return "the map does not state 'exact: true', so parameters that it does not fill may change the logits"
    return None


def compare_with_original(stream: Stream, original: Original) -> str:
    """Compare the logits of a model filled from another library's weights with those of the original.

    Args:
        stream: the filled model.
        original: the other model; its folder is loaded by transformers' own code.

    Returns:
        The result as a message.

    Raises:
        UserError: transformers cannot load the folder, or the logits differ.
    """
    assert original.folder is not None
    length = min(_TOKENS, stream.source.model_config.max_position_embeddings, original.longest or _TOKENS)
    ids_BS = _prompt(length, original.vocab_size)
    theirs_BSV = _transformers_logits(original.folder, ids_BS, own_code=False)
    vocabulary = min(original.vocab_size, theirs_BSV.shape[-1])
    theirs_BSV = theirs_BSV[..., :vocabulary]
    ours_BSV = fusiontree_logits(stream, ids_BS, torch.float32)[..., :vocabulary]
    largest = max(1.0, float(theirs_BSV.abs().max()))
    difference = float((ours_BSV - theirs_BSV).abs().max()) / largest
    if not difference <= ORIGINAL_TOLERANCE:  # also if the difference is NaN
        raise UserError(
            f"logits of the new model differ from those of {original.folder} by {difference:.1e} of the largest "
            f"({largest:.3g}), {ORIGINAL_TOLERANCE:.0e} allowed; nothing was kept. The map fills all that it names, so "
            f"parameters that keep initial values must have no effect, or the map must not state 'exact: true'"
        )
    return (
        f"verified: logits on a prompt of {length} tokens equal those of {original.folder} in transformers (largest "
        f"{largest:.3g}, difference {difference:.1e} of it, {ORIGINAL_TOLERANCE:.0e} allowed)"
    )


def _prompt(length: int, vocab_size: int) -> Tensor:
    return (torch.arange(length)[None] * 7919 + 13) % vocab_size


def compare_logits(stream: Stream, folder: Path) -> str:
    """Compare the folder's logits with those of the FusionTree model with the same weights.

    If they differ by more than the tolerance, a forward of the FusionTree model in fp64 measures the error of fp32.

    Args:
        stream: the folder's source; its tensors are read again.
        folder: the exported folder.

    Returns:
        The result as a message.

    Raises:
        UserError: the folder cannot be loaded, or its logits differ.
    """
    config = stream.source.model_config
    length = min(_TOKENS, config.max_position_embeddings)
    ids_BS = _prompt(length, config.vocab_size)
    ours_BSV = fusiontree_logits(stream, ids_BS, torch.float32)
    theirs_BSV = _transformers_logits(folder, ids_BS, own_code=True)
    largest = max(1.0, float(ours_BSV.abs().max()))

    def apart(other_BSV: Tensor) -> float:
        return float((ours_BSV - other_BSV).abs().max()) / largest

    difference, allowed, why = apart(theirs_BSV), TOLERANCE, ""
    if TOLERANCE < difference <= _MOST:
        rounding = apart(fusiontree_logits(stream, ids_BS, torch.float64))
        allowed = min(_MOST, max(TOLERANCE, _ROUNDINGS * rounding))
        why = f": {_ROUNDINGS} times what our own differ by from fp64"
    if not difference <= allowed:  # also if the difference is NaN
        raise UserError(
            f"logits of the exported model differ from ours by {difference:.1e} of the largest ({largest:.3g}), "
            f"{allowed:.1e} allowed{why}; nothing was kept. The weights are equal, so report this; --check-logits off "
            f"exports anyway"
        )
    return (
        f"verified: logits of the exported model on a prompt of {length} tokens equal ours in fp32 "
        f"(largest {largest:.3g}, difference {difference:.1e} of it, {allowed:.1e} allowed{why})"
    )


@torch.no_grad()
def fusiontree_logits(stream: Stream, ids_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits of the model in a stream, in fp64.

    Args:
        stream: of all parameters, which are rounded to the types that are written.
        ids_BS: int64, the prompt.
        dtype: of the computation.
    """
    with torch.device("meta"):
        model = FusionTreeModel(stream.source.model_config).to(dtype)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        # Cast through the dtype that was written.
        parameter.copy_(stream.source.read(MODEL + name).to(stream.entry(MODEL + name).dtype))
    logits_BSV = model.eval()(ids_BS).logits_BSV
    assert logits_BSV is not None
    return logits_BSV.double()


def _transformers_logits(folder: Path, ids_BS: Tensor, *, own_code: bool) -> Tensor:
    with tempfile.TemporaryDirectory(prefix="logits-") as scratch:
        ids_file, output = Path(scratch) / "ids.pt", Path(scratch) / "logits.pt"
        torch.save(ids_BS, ids_file)
        # Without -P the working directory would come first among the places that modules are imported from.
        command = [sys.executable, "-P", "-c", _TRANSFORMERS_PROGRAM, str(folder), str(ids_file), str(output)]
        command.append("yes" if own_code else "no")
        environment = child_environment(HF_MODULES_CACHE=str(Path(scratch) / "modules"), HF_HUB_OFFLINE="1")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(
                f"transformers could not compute logits of {folder} ({last}); nothing was kept. --check-logits off "
                f"converts without this check"
            )
        return torch.load(output, weights_only=True).double()
