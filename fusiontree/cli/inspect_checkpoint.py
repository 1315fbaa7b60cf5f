"""Shows the content of a training checkpoint, verifies it, or compares two checkpoints.

fusiontree checkpoint inspect RUN
fusiontree checkpoint inspect RUN/checkpoints/step-00001000 --verify
fusiontree checkpoint inspect --diff RUN_A RUN_B
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import run_program
from fusiontree.tracking.console import report_bytes
from fusiontree.tracking.json_lines import finite
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fusiontree.checkpoint.reader import CheckpointReader


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Show a checkpoint. Tensors are read one at a time, each checked against its recorded hash; "
        "nothing in the checkpoint is executed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", nargs="?", type=Path, metavar="PATH", help="run folder (its newest checkpoint) or checkpoint folder")
    add("--verify", action="store_true", help="only compare every file with its recorded hash")
    add("--diff", nargs=2, type=Path, metavar=("A", "B"), help="show the differences between two checkpoints")
    add("--no-norms", action="store_true", help="names, shapes and types only; tensors are not read")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if ``--diff`` found a difference, or 2: damaged checkpoint or user error."""
    return run_program(build_parser, command, argv)


def command(args: argparse.Namespace) -> int:
    """Show, verify or compare; return the exit code of :func:`main`.

    Raises:
        UserError: the checkpoint is damaged or an option is wrong; the message names the run's other checkpoints.
    """
    try:
        if args.diff and args.path is None:
            return difference(*args.diff, as_json=args.json)
        if args.diff or args.path is None:
            raise UserError("give one PATH, or --diff A B")
        if args.verify:
            return whole(args.path, as_json=args.json)
        return contents(args.path, norms=not args.no_norms, as_json=args.json)
    except UserError as error:
        raise UserError(f"{error}{others(args.path)}") from None
    except BrokenPipeError:
        return 0


def others(path: Path | None) -> str:
    """Return the run's checkpoints as the end of an error message."""
    from fusiontree.checkpoint.folders import complete_checkpoints

    found = complete_checkpoints(path / "checkpoints") if path is not None else []
    return f"; {path} has {', '.join(folder.name for folder in found[-5:])}" if len(found) > 1 else ""


def opened(path: Path) -> CheckpointReader:
    """Return the checkpoint that ``path`` names.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    from fusiontree.checkpoint.load import find_checkpoint
    from fusiontree.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(find_checkpoint(path))
    reader.check_small_files()
    return reader


def whole(path: Path, *, as_json: bool) -> int:
    """Compare every file with its recorded hash."""
    from fusiontree.checkpoint.load import find_checkpoint
    from fusiontree.checkpoint.manifest import read_manifest
    from fusiontree.checkpoint.verify import verify

    folder = find_checkpoint(path)
    entries = read_manifest(folder)
    began = time.monotonic()
    verify(folder, report=report_bytes(lambda text: print(text, file=sys.stderr), "verified", every_s=2))
    size, seconds = sum(entry.size for entry in entries.values()), time.monotonic() - began
    if as_json:
        print(json.dumps({"ok": True, "folder": str(folder), "files": len(entries), "bytes": size, "seconds": seconds}))
    else:
        print(f"ok: {folder}, {len(entries)} files, {size / 1e9:.2f} GB in {seconds:.1f} s")
    return 0


def contents(path: Path, *, norms: bool, as_json: bool) -> int:
    """Print state and tensors of a checkpoint."""
    from fusiontree.checkpoint.load import read_state

    reader = opened(path)
    state = read_state(reader.folder)
    head = {
        "folder": str(reader.folder),
        "step": state.get("step"),
        "tokens": state.get("tokens"),
        "validation_loss": state.get("validation_loss"),
        "data": state.get("data"),
        "engine": state.get("engine"),
        "files": len(reader.files),
        "bytes": sum(entry.size for entry in reader.files.values()),
        "saved_by": saved_by(state),
    }
    rows = [row(reader, name, norms) for name in reader.tensors]
    if as_json:
        print(json.dumps(finite(head | {"tensors": rows}), indent=1))
        return 0
    for key, value in head.items():
        print(f"{key:16} {json.dumps(value) if isinstance(value, dict) else value}")
    width = max((len(r["name"]) for r in rows), default=0)
    for r in rows:
        norm = f"  norm {r['norm']:.6g}  max {r['max']:.4g}{'  NOT FINITE' if not r['finite'] else ''}" if norms else ""
        print(
            f"{r['name']:{width}}  {r['dtype']:9} {r['shape']!s:16} {r['pieces']} piece{'s' * (r['pieces'] != 1)}{norm}"
        )
    for kind, count in totals(reader).items():
        print(f"{kind}: {count:,} values")
    return 0


def saved_by(state: dict[str, Any]) -> str:
    """Return the layout that saved the checkpoint, as text."""
    parallel = state.get("config", {}).get("parallel", {})
    return ", ".join(f"{key} {value}" for key, value in parallel.items() if value is not None) or "unknown"


def row(reader: CheckpointReader, name: str, norms: bool) -> dict[str, Any]:
    """Return name, shape, dtype, pieces and norms of a tensor."""
    saved = reader.tensors[name]
    values: dict[str, Any] = {
        "name": name,
        "shape": list(saved.shape),
        "dtype": str(saved.dtype).removeprefix("torch."),
        "pieces": saved.pieces,
    }
    if norms:
        tensor = reader.read(name)
        values |= {
            "norm": norm_of(tensor),
            "max": float(tensor.abs().max()) if tensor.numel() else 0.0,
            "finite": bool(tensor.isfinite().all()),
        }
    return values


def norm_of(tensor: Tensor) -> float:
    """Return the Euclidean norm, summed in fp64 a few million values at a time."""
    return sum(float(part.double().square().sum()) for part in tensor.reshape(-1).split(1 << 22)) ** 0.5


def totals(reader: CheckpointReader) -> dict[str, int]:
    """Return the number of values of each kind: model, optimizer.exp_avg and so on."""
    counts: dict[str, int] = {}
    for name, saved in reader.tensors.items():
        kind = ".".join(name.split(".")[:2]) if name.startswith("optimizer.") else name.split(".")[0]
        counts[kind] = counts.get(kind, 0) + math.prod(saved.shape)
    return counts


def difference(path_a: Path, path_b: Path, *, as_json: bool) -> int:
    """Print the differences of two checkpoints, saved by any layouts; return 1 if there are any."""
    from fusiontree.checkpoint.load import read_state

    a, b = opened(path_a), opened(path_b)
    values = list(differing_values(read_state(a.folder), read_state(b.folder)))
    tensors = list(differing_tensors(a, b))
    equal = len(a.tensors.keys() & b.tensors.keys()) - sum(t["in"] == "both" for t in tensors)
    if as_json:
        found = {"a": str(a.folder), "b": str(b.folder), "values": values, "tensors": tensors}
        print(json.dumps(finite(found), indent=1))
        return 1 if values or tensors else 0
    print(f"A {a.folder}\nB {b.folder}")
    for line in values:
        print(f"{line['key']}: {shortened(line['a'])} | {shortened(line['b'])}")
    for t in tensors:
        print(f"{t['name']}: {t['what']}")
    print(f"{equal} tensors are equal bit by bit, {len(tensors)} are not; {len(values)} other values differ")
    return 1 if values or tensors else 0


def shortened(value: Any) -> str:
    """Return a value, shortened; ``--json`` prints it in full."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:90]}… ({len(text)} characters)"


def differing_values(a: Any, b: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield the state values that differ, each with its dotted key."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from differing_values(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield {"key": key, "a": a, "b": b}


def differing_tensors(a: CheckpointReader, b: CheckpointReader) -> Iterator[dict[str, Any]]:
    """Yield the tensors that differ in any bit."""
    import torch

    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if name not in a.tensors or name not in b.tensors:
            side = "A" if name in a.tensors else "B"
            yield {"name": name, "in": side, "what": f"only in {side}"}
            continue
        one, two = a.tensors[name], b.tensors[name]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            what = f"{one.dtype} {one.shape} | {two.dtype} {two.shape}"
            yield {"name": name, "in": "both", "what": what}
            continue
        left, right = a.read(name), b.read(name)
        if not torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8)):
            apart = left.double().sub_(right.double())
            count, most = int((apart != 0).sum()), float(apart.abs().max())
            relative = norm_of(apart) / (norm_of(left) or 1.0)
            what = f"{count} of {left.numel()} values, by {most:.3g} at most, {relative:.3g} of the norm"
            yield {"name": name, "in": "both", "what": what, "values": count, "max": most}
