"""Many runs, many faults: does each finish with the losses of an undisturbed run, or say why it stopped?

    python -m tools.fault_campaign --faults 200 --seed 0 --out DIR

Every run is a tiny model on CPU ranks. It is killed, stopped, poisoned, slowed, and started again until it finishes;
then every step's loss must equal the reference's (fp32, 1e-5) and every step's token hash exactly. A start that stops
with exit code 2 must name its cause; the campaign mends it (puts the shard back, say) and starts again. The same seed
gives the same faults at the same moments. Results go to DIR/faults.jsonl, one line per run, and DIR/summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

if not __package__:  # called by its path, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.fault_injection import Fault
from tools.fault_runs import FaultyRun, References
from tools.fault_starts import build_corpus, can_mount

ENDING = ("kill", "hang", "term", "usr1", "int", "corrupt", "lost_shard", "full_disk")
"""Faults after which the run has to be started again (a full disk need not)."""
PASSING = ("nan", "slow", "clock", "wandb")
"""Faults that a run survives."""


def plan_faults(random: Random, kinds: Sequence[str]) -> list[Fault]:
    """Return one fault per start of a run: first some that end it, then a fault that it survives.

    Two stops in the first steps follow each damaged checkpoint: each saves an older step than the damaged one, and
    retention must keep what these resume from.
    """
    ending = [kind for kind in ENDING if kind in kinds]
    passing = [kind for kind in PASSING if kind in kinds]
    faults = []
    for _ in range(random.randint(2, 4) if ending else 0):
        faults.append(plan_fault(random, random.choice(ending)))
        if faults[-1].kind == "corrupt":
            faults += [Fault("term", random.randrange(2), random.randint(1, 3), section="forward") for _ in range(2)]
    return faults + [plan_fault(random, random.choice(passing)) for _ in range(1 if passing else 0)]


def plan_fault(random: Random, kind: str) -> Fault:
    """Return a fault of a kind at a random moment of the first steps after a start."""
    rank = random.randrange(2)
    delay = random.choice((0.0, random.uniform(0.0, 0.05)))
    if kind in ("slow", "wandb"):
        return Fault(kind, rank, 1, section="wait for data", amount=0.8)
    if kind == "clock":
        return Fault(kind, 0, random.randint(1, 40), amount=random.choice((-1, 1)) * random.uniform(60, 1e6))
    if kind == "full_disk":
        return Fault(kind, 0, random.randint(1, 40), amount=random.choice((0, random.randint(0, 300_000))))
    if kind == "nan":
        return Fault(kind, rank, random.randint(1, 8), section="forward")
    if random.random() < 0.3:  # saving and starting are short and the most delicate
        section, entry = random.choice((("resume", 1), ("save", random.randint(1, 3))))
        return Fault(kind, rank, entry, section=section, delay_s=delay)
    return Fault(kind, rank, random.randint(4, 60), delay_s=delay)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Inject faults into many small runs and compare their losses.")
    parser.add_argument("--faults", type=int, default=200, help="stop after this many faults happened")
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, ranks and moments")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for runs and results; new")
    parser.add_argument("--kinds", nargs="+", default=[*ENDING, *PASSING], choices=[*ENDING, *PASSING])
    parser.add_argument("--runs", type=int, nargs="+", metavar="N", help="do these runs of the seed alone")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--engine", default="fsdp2", help="parallel.engine of the runs")
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs that passed, too")
    return parser


def _progress(done: int, wanted: int, seconds: float) -> str:
    """Return how far the campaign is, its rate and the time that is left."""
    rate = done / max(seconds, 1e-9)
    left = f"{max(wanted - done, 0) / rate:.0f} s left" if done else "no estimate yet"
    return f"{done} of {wanted} faults, {60 * rate:.1f} per minute, {left}"


def campaign(args: argparse.Namespace) -> dict[str, Any]:
    """Run it and return the summary."""
    args.out.mkdir(parents=True)
    kinds = list(args.kinds)
    if "full_disk" in kinds and not can_mount(args.out):
        print("no full disks: mounting a small file system needs root", flush=True)
        kinds.remove("full_disk")
    corpus = build_corpus(args.out / "corpus")
    references = References(args.out, corpus, args.engine)
    began = time.monotonic()
    lock = threading.Lock()
    results: list[dict[str, Any]] = []
    happened: Counter[str] = Counter()

    def one(number: int) -> None:
        random = Random(f"{args.seed} {number}")
        with lock:
            if happened.total() >= args.faults:
                return
        run = FaultyRun(args.out / f"run-{number:04d}", corpus, references, args.engine, random)
        result = {"run": number, **run.go(plan_faults(random, kinds))}
        with lock:
            results.append(result)
            happened.update(result["fired"])
            with (args.out / "faults.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            verdict = "ok" if result["ok"] else "FAILED: " + result["problem"]
            print(
                f"run {number}: {' '.join(result['fired'])}: {result['starts']} starts, {verdict} "
                f"({_progress(happened.total(), args.faults, time.monotonic() - began)})",
                flush=True,
            )
        if result["ok"] and not args.keep:
            run.remove()

    with ThreadPoolExecutor(args.parallel) as pool:
        # Far more than are needed: a fault whose moment lies behind the run's end does not happen.
        list(pool.map(one, args.runs or range(args.faults)))
    good = [r for r in results if r["ok"]]
    summary = {
        "seed": args.seed,
        "engine": args.engine,
        "faults": happened.total(),
        "by_kind": dict(sorted(happened.items())),
        "runs": len(results),
        "finished_with_reference_losses": len(good),
        "failed": sorted(r["run"] for r in results if not r["ok"]),
        "starts": sum(r["starts"] for r in results),
        "stops_that_named_their_cause": sum(len(r["stops"]) for r in results),
        "median_goodput": sorted(r["goodput"] for r in results)[len(results) // 2] if results else None,
        "seconds": round(time.monotonic() - began, 1),
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; exit code 0 if no run lost anything, 1 otherwise."""
    args = build_parser().parse_args(argv)
    if args.out.exists():
        print(f"error: '{args.out}' exists; name a new folder", file=sys.stderr)
        return 2
    summary = campaign(args)
    print(json.dumps(summary))
    print(f"results: {args.out / 'faults.jsonl'} (one line per run), {args.out / 'summary.json'}")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
