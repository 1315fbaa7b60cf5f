"""Reads the config.json beside another model's weights: what it says in terms of this project's settings.

Every key of the file is accounted for: it equals a setting, has no effect on what the model computes, or is an
obstacle. Unknown keys are obstacles, so that no feature of another model is left out without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fusiontree.convert.foreign_families import FAMILIES
from fusiontree.convert.foreign_reading import TIED, Foreign, Reading
from fusiontree.convert.hf import CONFIG
from fusiontree.convert.hf_tokenizer import read_json
from fusiontree.models.config import ModelConfig
from fusiontree.utils.errors import UserError

PARTS = {"attention": ".attention.", "mamba": ".mamba.", "delta": ".delta.", "mlp": ".mlp."}
PARTS |= {"norm": "norm.weight", "embed": "embed.weight"}
"""Text in the names of the parameters that a part of the model consists of; the part "model" is always used."""


class Agreement(NamedTuple):
    """How a configuration of ours and another model's configuration fit."""

    adopted: dict[str, Any]
    """Settings that take the other model's value, because our configuration does not name them."""
    differences: list[str]
    """Accepted differences; with any, the new model does not compute what the other does."""


def read_foreign(path: Path) -> Foreign | None:
    """Return the configuration beside weights; None if there is no config.json.

    Args:
        path: a folder of weights, or a file.

    Raises:
        UserError: it cannot be read, or a value is of another type than expected.
    """
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        return None
    values = read_json(file)
    kind = str(values.get("model_type"))
    reading = Reading(Foreign(file, kind), values)
    if kind in FAMILIES:
        FAMILIES[kind](reading)
        reading.finish()
    else:
        known = ", ".join(FAMILIES)
        reading.obstacle("model_type", "model", f"is '{kind}', whose configuration is not known here, only {known}")
    return reading.foreign


def agree(
    foreign: Foreign, model: ModelConfig, explicit: set[str], targets: Iterable[str], accept: list[str]
) -> Agreement:
    """Compare another model's configuration with ours.

    Args:
        foreign: of the other model.
        model: our section ``model``.
        explicit: settings that our configuration file names, dotted; they are never replaced.
        targets: names of the parameters that a map fills; only what concerns them is compared.
        accept: settings and keys that may differ.

    Raises:
        UserError: settings differ, or no setting expresses what the other model does; names all of them.
    """
    names = list(targets)
    used = {"model"} | {part for part, text in PARTS.items() if any(text in name for name in names)}
    adopted: dict[str, Any] = {}
    differences, refused = [], []
    for name, (part, theirs) in foreign.settings.items():
        ours = effective(model, name)
        absent = ours is None and name.startswith("mixers.")  # the map then names parameters that ours does not have
        if part not in used or ours == theirs or absent:
            continue
        said = f"model.{name} is {ours}, and theirs is {theirs}"
        if name in accept:
            differences.append(said)
        elif name == TIED and theirs and name in explicit:
            continue  # two equal matrices compute the same as one
        elif name in explicit:
            refused.append(f"{said} (leave the setting out to take theirs)")
        else:
            adopted[name] = theirs
    for key, (part, why) in foreign.obstacles.items():
        if part in used:
            (differences if key in accept else refused).append(f"{key} {why}")
    if refused:
        keys = [said.removeprefix("model.").split()[0] for said in refused]
        raise UserError(
            f"{foreign.file} describes what this configuration does not compute: {'; '.join(refused)}. To start from "
            f"these weights all the same, give a map with 'accept: [{', '.join(keys)}]'"
        )
    return Agreement(adopted, differences)


def effective(model: ModelConfig, name: str) -> Any:
    """Return the value that a dotted setting has when the model is built; None if the model has no such mixer."""
    if name == "num_kv_heads":
        return model.kv_heads
    if name == "head_dim":
        return model.attention_head_dim
    value: Any = model
    for key in name.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif value is not None:
            value = getattr(value, key)
    return value
