"""All steps of a small run on any machine: token shards, training, a stop, a resume, generated text, a plot.

``fusiontree quickstart`` and, after installing, ``make quickstart`` run it in the current folder. A second start
continues the first; delete runs/quickstart to start over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fusiontree.cli.program import run_program
from fusiontree.utils.environment import environment_with_defaults

RUN = Path("runs/quickstart")
CONFIG = "quickstart"  # packaged: found in every folder
STOP = "training.exit_at_step=120"
PROMPT = "def "


def run(say: Callable[[str], None], *command: str, capture: bool = False) -> str:
    """Run a module with this python; return its output if ``capture``.

    ``say`` receives the command as a user would type it.

    Raises:
        SystemExit: it failed; with its exit code.
    """
    typed = [f"'{part}'" if " " in part or not part else part for part in command]
    shown = " ".join(["python", "-m", *typed]).replace("python -m torch.distributed.run", "torchrun")
    say("$ " + shown.replace("python -m fusiontree.cli", "fusiontree"))
    threads = max(1, (os.cpu_count() or 2) // processes())
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        env=None if count_gpus() else environment_with_defaults(OMP_NUM_THREADS=str(threads)),
    ) as child:
        try:
            output, _ = child.communicate()
        except KeyboardInterrupt:
            child.wait()  # a terminal sends Ctrl-C to the child as well, which saves a checkpoint before it ends
            raise
    if child.returncode:
        sys.exit(child.returncode)
    return output or ""


def count_gpus() -> int:
    """Number of GPUs torch can use."""
    import torch

    return torch.cuda.device_count()


def processes() -> int:
    """Ranks of the training: one per GPU, or two."""
    return count_gpus() or 2


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Token shards of Python's own sources, training, a stop, a resume, generated text and a picture: "
        "minutes on two CPU cores. Writes runs/quickstart in the current folder; a second start continues there."
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="print validations, results, warnings and errors only; no steps, no commands",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run every step; return the exit code."""
    stopped = "stopped; repeat the command to continue"
    return run_program(build_parser, lambda args: run_steps(args.quiet), argv, interrupted=stopped)


def run_steps(quiet: bool) -> int:
    """Build data, train, stop, resume, generate, plot; return 0, or 1 if the model did not learn."""

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    began = time.monotonic()
    gpus, ranks = count_gpus(), processes()
    machine = f"{gpus} GPU(s)" if gpus else f"no GPU, {ranks} processes on {os.cpu_count()} CPU cores"

    say(f"\n== 1/5  token shards from the Python standard library's sources ({machine})")
    sources = sysconfig.get_paths()["stdlib"]
    if not (RUN / "data" / "train" / "dataset.json").is_file():
        shutil.rmtree(RUN / "data", ignore_errors=True)
        run(
            say,
            *("fusiontree.cli", "data", "build", "--input", sources, "--include", "*.py", "--exclude", "site-packages"),
            *("--tokenizer", "byte", "--validation-fraction", "0.02", "--shuffle", "--shard-mb", "4"),
            *("--output", str(RUN / "data")),
            capture=quiet,
        )
    else:
        say(f"{RUN / 'data'} exists")
    bigram = json.loads((RUN / "data/train/dataset.json").read_text())["statistics"]["bigram_entropy_nats"]

    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    train = [*launch, "-m", "fusiontree.train", *(["--quiet"] if quiet else []), "--config", CONFIG]
    say(f"\n== 2/5  training with FSDP2 on {ranks} ranks; {STOP} stops it early, as a preemption would")
    run(say, *train, STOP)
    say("\n== 3/5  the same command again resumes from the checkpoint and trains to the end")
    run(say, *train)

    say("\n== 4/5  text from the checkpoint")
    generate = ("fusiontree.cli", "generate", "--checkpoint", str(RUN), "--prompt", PROMPT)
    sampling = ("--max-new-tokens", "400", "--temperature", "0.8", "--top-p", "0.95", "--seed", "1")
    sample = run(say, *generate, *sampling, capture=True)
    print(sample, flush=True)
    (RUN / "sample.txt").write_text(sample)

    say("\n== 5/5  plot and summary")
    run(say, "fusiontree.cli", "plot", str(RUN), "--reference", "bigram entropy", f"{bigram:.4f}", capture=quiet)
    return summarize(bigram, time.monotonic() - began)


def summarize(bigram: float, seconds: float) -> int:
    """Print results and files; return 1 if the validation loss is not below ``bigram``, the entropy of byte pairs."""
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    validation = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
    last = [r for r in records if "loss" in r][-1]
    print(f"""
validation loss   {validation:.3f} nats per byte ({validation / 0.6931:.2f} bits); byte pairs alone give {bigram:.3f}
trained on        {last["tokens"] / 1e6:.1f}M bytes at {last["tokens_per_s"]:,.0f} per second; {seconds:.0f} s in all

{RUN}/config.yaml       the resolved configuration
{RUN}/metrics.jsonl     loss, gradient norm, gates, speed of every logged step
{RUN}/events.jsonl      starts, resumes, saves
{RUN}/checkpoints/      read by resuming and converting
{RUN}/sample.txt        the text above
{RUN}/loss.png          losses, gates, learning rate, throughput
{RUN}/data/             token shards, readable by any WebDataset reader

Try next:
  fusiontree generate --checkpoint {RUN} --prompt 'class '
  fusiontree train --config {CONFIG} run_dir=runs/mine model.layer_pattern=MFMF training.max_steps=300
  fusiontree train --help
""")
    if validation >= bigram:
        print(
            f"error: validation loss {validation:.3f} is not below {bigram:.3f}; the model did not learn",
            file=sys.stderr,
        )
        return 1
    return 0
