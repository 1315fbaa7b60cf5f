"""Reading a configuration: YAML file, then overrides, then strict validation with errors a person can act on."""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fusiontree.config.moved import present_name, under_present_names
from fusiontree.config.packaged import find_file, hint_for
from fusiontree.config.plugins import load_plugins
from fusiontree.config.root import Config
from fusiontree.utils.environment import expand_path
from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.files import read_text
from fusiontree.utils.settings import Section, explain


class _Loader(yaml.SafeLoader):
    """YAML that reads ``3e-4`` as a number, ``010``, ``1:30`` and dates as texts, and refuses a key given twice."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """YAML that quotes texts which :class:`_Loader` would read as numbers, such as ``1e5``."""


_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # what the mapping itself says replaces what is merged into it
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"a key is a list or a mapping (line {line}); keys are names")
        if key_node.value in seen:
            raise UserError(f"key '{key_node.value}' is given twice (line {line}); remove one")
        seen.add(key_node.value)
        key_node.tag = "tag:yaml.org,2002:str"  # a name such as on, 2 or null is a text, too
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _drop_templates(root: yaml.Node, known: Sequence[str]) -> None:
    """Remove entries of a file that only hold what others take over (``base: &base {…}``, ``<<: *base``).

    An entry whose name is almost a known one stays, so that a slip of the pen is not dropped.
    """
    if not isinstance(root, yaml.MappingNode):
        return
    parts = [{id(node): node for node in _nodes(value)} for _, value in root.value]
    kept = []
    for number, (key, value) in enumerate(root.value):
        others = {node for i, part in enumerate(parts) if i != number for node in part}
        # An alias stands for a node that begins before the key.
        taken = any(n in others and node.start_mark.index > key.start_mark.index for n, node in parts[number].items())
        if not taken or difflib.get_close_matches(str(key.value), known, cutoff=0.8):
            kept.append((key, value))
    root.value = kept


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Yield every node of a tree once; an alias is the node that it names."""
    rest = [root]
    seen: set[int] = set()
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            rest.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            rest.extend(part for pair in node.value for part in pair)


def parse_yaml(text: str, place: str, known: Sequence[str] | None = None) -> Any:
    """Parse YAML text.

    Args:
        text: of a file or an override.
        place: names its origin in errors.
        known: keys of a file; other entries are left out if they hold what aliases elsewhere name.

    Raises:
        UserError: the text is no YAML, nests too deeply, or gives a key twice.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None and known is not None:
            _drop_templates(root, known)
        return None if root is None else loader.construct_document(root)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{place}: not valid YAML: it nests too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more than 4300 digits
        raise UserError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from error
    except (LookupError, AttributeError, TypeError) as error:  # as PyYAML raises them for '!!int', '!!bool maybe' …
        raise UserError(f"{place}: not valid YAML: a value does not fit its tag (!!int, !!bool …)") from error
    finally:
        if loader is not None:
            loader.dispose()


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply ``section.key=value`` overrides in order, and validate.

    Args:
        path: a file, or the name of a packaged configuration.
        overrides: later ones replace earlier ones.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest known one is named), or a value
            has the wrong type or range.
    """
    path = find_file(Path(expand_path(str(path))))
    if not path.is_file():
        raise UserError(f"config file '{path}' does not exist{hint_for(path)}")
    values = parse_yaml(read_text(path), str(path), Config.known_keys())
    if not isinstance(values, dict):
        raise UserError(f"config file '{path}' is empty or no mapping; it needs sections such as model, training, data")
    values = under_present_names(values, str(path))
    return build_config(apply_overrides(values, overrides), place=str(path))


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with each ``section.key=value`` set; values are read as YAML."""
    values = copy.deepcopy(values)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise UserError(f"override '{override}' is not of the form section.key=value")
        *parents, key = present_name(dotted).split(".")
        place = values
        for depth, parent in enumerate(parents):
            child = place.setdefault(parent, {})
            if child is None:
                child = place[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"override '{override}': {'.'.join(parents[: depth + 1])} is a value, not a section")
            place = child
        place[key] = parse_yaml(text, f"override '{override}'")
    return values


def build_config(values: dict[str, Any], place: str) -> Config:
    """Import the plugins that a mapping names and validate it; ``place`` names its origin in errors.

    Raises:
        UserError: a plugin cannot be imported, or a setting is wrong; lists every problem, one per line.
    """
    values = under_present_names(values, place)
    if wrong := list(_not_finite(values)):
        raise UserError("\n".join(f"{place}: '{name}' is {value}; write a finite number" for name, value in wrong))
    plugins = values.get("plugins")
    if isinstance(plugins, list) and all(isinstance(name, str) for name in plugins):
        load_plugins(plugins)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [f"{place}: {_explain(problem)}" for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def _not_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield dotted name and value of every number that is not finite or exceeds 64 bits, also where any is allowed."""
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 1 << 63):
        yield name, value
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        yield from _not_finite(inner, f"{name}.{key}".lstrip("."))


def _explain(problem: Any) -> str:
    location: tuple[int | str, ...] = problem["loc"]
    # Union branches add their type's name to the location; a reader knows only keys and list positions.
    parts = [str(part) for part in location if not re.search(r"[\[\]\(\)<>]|^(str|int|float|bool)$", str(part))]
    dotted = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        key = str(location[-1])  # whatever characters it has
        parents = parts[:-1] if parts[-1:] == [key] else parts
        dotted = ".".join([*parents, key])
        section = _section_at(parents)
        known = section.known_keys() if section else []
        hint = nearest(key, known) or (f"; known keys: {', '.join(known)}" if known else "")
        elsewhere = [name for name in _all_keys() if name.split(".")[-1] == key]
        if elsewhere:
            hint = f"; '{key}' belongs in {min(elsewhere, key=lambda name: name.count('.'))}"
        return f"unknown key '{dotted}'{hint}"
    return explain(problem, dotted)


def _section_at(parents: Sequence[str]) -> type[Section] | None:
    section: type[Section] = Config
    for parent in parents:
        if parent.isdigit():
            continue
        field = next((f for n, f in section.model_fields.items() if parent in (n, f.alias)), None)
        nested = field_section(field) if field else None
        if nested is None:
            return None
        section = nested
    return section


def section_type(annotation: Any) -> type[Section] | None:
    """Return the :class:`Section` inside an annotation such as ``Section``, ``list[Section]`` or a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in get_args(annotation):
        found = section_type(inner)
        if found:
            return found
    return None


def field_section(field: FieldInfo) -> type[Section] | None:
    """Return the :class:`Section` inside a field; where the default is of a derived section, that one."""
    section = section_type(field.annotation)
    default = field.default_factory
    return default if isinstance(default, type) and section and issubclass(default, section) else section


def _all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        nested = field_section(field)
        keys.append(dotted)
        if nested:
            keys += _all_keys(nested, f"{dotted}.")
    return keys


def config_values(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as plain values, under the names the YAML file uses."""
    return config.model_dump(mode="json", by_alias=True)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that :func:`load_config` reads back to an equal one."""
    values = config_values(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)
