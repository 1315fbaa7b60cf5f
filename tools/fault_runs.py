"""One run of the fault campaign: starts until it finishes, comparison with a reference."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path
from random import Random
from typing import Any

from fusiontree.tracking.goodput import account
from fusiontree.tracking.records import read_records
from tools.fault_injection import Fault
from tools.fault_starts import STEPS, free_port, mount_small, start, unmount, write_config

STARTS = 16
"""A run that has not finished after this number of starts counts as failed."""
NAMED = {
    "lost_shard": ("shard",),
    "full_disk": ("space", "free", "disk", "could not be written"),
    "corrupt": ("checkpoint",),
}
"""One of these words must be in the message of a start that stops for the fault."""


class References:
    """Undisturbed runs of one process: one for every set of steps that faults made others skip."""

    def __init__(self, folder: Path, data: Path, engine: str) -> None:
        """Run nothing yet."""
        self.folder, self.data, self.engine = folder, data, engine
        self._known: dict[int | None, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def metrics(self, skipped: int | None) -> list[dict[str, Any]]:
        """Return the metrics of a run that skipped step ``skipped``, or none."""
        with self._lock:
            if skipped not in self._known:
                folder = self.folder / f"reference-{skipped or 'plain'}"
                folder.mkdir()
                config = write_config(folder, self.data, self.engine)
                # Two micro-batches per step on one rank.
                faults = [Fault("nan", 0, 2 * skipped - 1, section="forward")] if skipped else []
                codes = start(folder, config, 1, faults, {})
                assert codes == [0], (folder / "log.txt").read_text()
                self._known[skipped] = read_records(folder / "run" / "metrics.jsonl")
            return self._known[skipped]


class FaultyRun:
    """A run that suffers a fault at each of its first starts."""

    def __init__(self, folder: Path, data: Path, references: References, engine: str, random: Random) -> None:
        """Prepare its folder, on a small file system of its own where that is possible, with its own shards."""
        self.folder, self.references, self.engine, self.random = folder, references, engine, random
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.mounted = mount_small(self.disk, 24)
        self.data = self.disk / "data"
        shutil.copytree(data, self.data)
        self.run = self.disk / "run"
        self.log = folder / "log.txt"
        self.hidden: tuple[Path, Path] | None = None
        self.stops: list[str] = []
        self.corrupted: list[str] = []

    def go(self, faults: list[Fault]) -> dict[str, Any]:
        """Start until the run finishes; return its account, with ``ok`` and ``problem``."""
        problem, starts, left = None, 0, list(faults)
        while problem is None:
            if starts >= STARTS:
                problem = f"not finished after {STARTS} starts"
                break
            # A start that is to be refused would use its fault up.
            fault = left.pop(0) if left and not self.hidden else None
            world = 2 if fault or self.random.random() < 0.7 else 1
            seen = len(self.fired())
            mark = self.log.stat().st_size if self.log.exists() else 0
            codes = self._start(world, fault)
            starts += 1
            if fault and len(self.fired()) == seen:
                fault = None  # the run was over before its moment came
            if all(code == 0 for code in codes):
                break
            problem = self._after_stop(codes, fault, mark)
        problem = problem or self._compare()
        goodput = account(self.run) if (self.run / "events.jsonl").exists() else None
        fired = [note["kind"] for note in self.fired()]
        return {
            "ok": problem is None,
            "problem": problem or "",
            "fired": fired,
            "notes": self.fired(),
            "starts": starts,
            "stops": self.stops,
            "goodput": round(goodput.share, 3) if goodput else 0.0,
            "interruptions": [i.cause for i in goodput.interruptions] if goodput else [],
        }

    def fired(self) -> list[dict[str, Any]]:
        """Return the faults that happened, in order."""
        return [json.loads(p.read_text()) for p in sorted(self.folder.glob("fired-*.json")) if p.stat().st_size]

    def remove(self) -> None:
        """Delete the run's folder."""
        if self.mounted:
            unmount(self.disk)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, world: int, fault: Fault | None) -> list[int]:
        sections: dict[str, dict[str, Any]] = {}
        environment: dict[str, str] = {}
        faults = [fault] if fault else []
        if fault and fault.kind == "wandb":
            sections["logging"] = {"log_interval": 1, "trackers": ["wandb"]}
            environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": "0" * 40}
        config = write_config(self.folder, self.data, self.engine, self.run, **sections)
        return start(self.folder, config, world, faults, environment)

    def _after_stop(self, codes: list[int], fault: Fault | None, mark: int) -> str | None:
        """Repair or damage files between two starts; return how the last end differs from the expected, or None."""
        kind = fault.kind if fault else ""
        said = self.log.read_bytes()[mark:].decode(errors="replace")
        (self.disk / "filler").unlink(missing_ok=True)
        if kind == "corrupt":
            self._corrupt_newest()
        elif kind == "lost_shard":
            shard = self.random.choice(sorted((self.data / "train").glob("*.tar")))
            self.hidden = (shard, shard.with_suffix(".hidden"))
            self.hidden[0].rename(self.hidden[1])
        elif 2 in codes:
            messages = [line for line in said.splitlines() if line.startswith("error: ")]
            if not messages:
                return f"stopped with exit codes {codes} and no message"
            self.stops.append(messages[-1][:300])
            if self.hidden:
                if self.hidden[0].name not in said:
                    return f"a lost shard was not named: {messages[-1]}"
                self.hidden[1].rename(self.hidden[0])
                self.hidden = None
            elif kind not in NAMED or not any(word in messages[-1] for word in NAMED[kind]):
                return f"stopped for no injected reason: {messages[-1]}"
        elif fault is None and not self.hidden:
            return f"ended with exit codes {codes} without a fault: {said[-400:]}"
        return None

    def _corrupt_newest(self) -> None:
        """Damage one file of the newest checkpoint: flip a bit, cut it, or delete it. The only one is left alone."""
        folders = sorted(p for p in (self.run / "checkpoints").glob("step-*") if (p / "manifest.json").exists())
        if len(folders) < 2:
            return
        file = self.random.choice(sorted(p for p in folders[-1].rglob("*") if p.is_file() and p.stat().st_size))
        self.corrupted.append(folders[-1].name)
        content = bytearray(file.read_bytes())
        how = self.random.choice(("flip", "cut", "delete"))
        if how == "delete":
            file.unlink()
        else:
            place = self.random.randrange(len(content))
            if how == "flip":
                content[place] ^= 1 << self.random.randrange(8)
            file.write_bytes(content if how == "flip" else content[:place])

    def _compare(self) -> str | None:
        """Return how the finished run differs from the reference, or None."""
        metrics = read_records(self.run / "metrics.jsonl")
        events = read_records(self.run / "events.jsonl")
        steps = [r for r in metrics if "loss" in r]
        if [r["step"] for r in steps] != list(range(1, STEPS + 1)):
            return f"steps logged: {[r['step'] for r in steps]}"
        skipped = [r["step"] for r in steps if r["loss"] is None]
        poisoned = {note["step"]: note["rank"] for note in self.fired() if note["kind"] == "nan"}
        if len(skipped) > 1 or not set(skipped) <= poisoned.keys():
            return f"steps {skipped} were skipped, poisoned were {poisoned}"
        for step in skipped:
            said = [e["reason"] for e in events if e["event"] == "step_skipped" and e["step"] == step]
            if not any(f"on rank {poisoned[step]}" in text and ".tar" in text for text in said):
                return f"step {step}: rank {poisoned[step]} and its shard are not named in {said}"
        reference = self.references.metrics(skipped[0] if skipped else None)
        for mine, wanted in zip(metrics, reference, strict=True):
            for key in ("step", "tokens_hash", "tokens", "loss", "lm_loss", "grad_norm", "validation_loss"):
                a, b = mine.get(key), wanted.get(key)
                close = isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-5)
                same = a == b or close  # None where a number is not finite
                if not same:
                    return f"step {mine['step']}: {key} is {a}, the reference has {b}"
        return self._missing_event(events)

    def _missing_event(self, events: list[dict[str, Any]]) -> str | None:
        """Return which fault left no trace in events.jsonl, or None."""

        def said(*kinds: str) -> str:
            return "; ".join(str(event.get("reason", "")) for event in events if event["event"] in kinds)

        for note in self.fired():
            kind, rank = note["kind"], note["rank"]
            if kind == "clock" and not said("clock_jump"):
                return "a clock jumped and no event says so"
            if kind == "wandb" and not said("wandb_offline"):
                return "the wandb server was dead and no event says so"
            if kind == "hang" and f"rank {rank} left no report" not in said("hang", "crash"):
                return f"rank {rank} was stopped in '{note['in']}' and is not named: {said('hang', 'crash')}"
            if kind == "slow" and f"rank {rank} (" not in said("slow_rank"):
                return f"rank {rank} was slow and is not named: {said('slow_rank')}"
        for name in self.corrupted:
            if name not in said("checkpoint_damaged"):
                return f"{name} was damaged and no event says so"
        return None
