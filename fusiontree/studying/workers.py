"""Runs a study's runs side by side, one per slot (on a GPU or on CPUs), and says how far they are."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fusiontree.studying.config import StudyConfig
from fusiontree.studying.results import (
    DONE,
    EVALUATION,
    final_loss,
    is_trained,
    mark_trained,
    same_rate,
    trained_differently,
)
from fusiontree.studying.runs import Run, choose_rates, chosen_rate, search_of
from fusiontree.tracking.console import clock, short
from fusiontree.tracking.records import read_records
from fusiontree.utils.environment import environment_with_defaults, name_of_gpu

_STOPPED = 75
_GRACE_S = 120.0
"""Time in which a stopped run may save its checkpoint."""
_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass
class Job:
    """A process of a run."""

    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    evaluates: bool
    log_begins: int
    """Bytes of earlier processes in the log."""
    began: float = field(default_factory=time.monotonic)
    step_before: int = 0
    """Step of the run when the process started."""


class Workers:
    """Starts runs in free slots until all are finished, failed or stopped.

    A finished run is skipped, an unfinished one resumes from its checkpoint, and a failed one is named while the others
    go on. SIGTERM, SIGINT and the time limit let every run save a checkpoint.
    """

    def __init__(
        self,
        study: StudyConfig,
        runs: Sequence[Run],
        folder: Path,
        slots: int,
        *,
        gpus: int,
        only: Callable[[Run], bool],
        time_limit_s: float | None,
        say: Callable[[str], None],
        every_s: float = 15.0,
        elsewhere: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Prepare; ``runs`` are of :func:`plan_runs`, ``only`` selects those to start.

        ``gpus`` is the number of GPUs, over which the slots are spread; 0 on CPUs. ``elsewhere`` has entries of runs in
        the results of other machines; finished ones are not started.
        """
        self.study, self.planned, self.folder, self.slots = study, list(runs), folder, slots
        self.gpus, self.only, self.say, self.every_s = gpus, only, say, every_s
        self.began = time.monotonic()
        self.deadline = None if time_limit_s is None else self.began + time_limit_s
        self.elsewhere = {run["name"]: run for run in elsewhere if run["state"] == "finished"}
        self.jobs: list[Job] = []
        self.failed: dict[str, str] = {}
        """Name of a failed run -> its last line of output."""
        self.stopping: str | None = None
        """Why no run is started any more."""
        self._signal: str | None = None
        """Name of the last signal that asked to stop."""
        self.interrupted = 0
        self.spent = 0.0
        """FLOPs of the steps that this call's finished processes computed."""

    def run_all(self) -> None:
        """Run until nothing is left to do."""
        handlers = {number: signal.signal(number, self._stop_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        said = time.monotonic()
        try:
            self._start_jobs()
            while self.jobs:
                time.sleep(0.2)
                ended = [job for job in self.jobs if job.process.poll() is not None]
                for job in ended:
                    self._finish(job)
                if self._signal is not None:
                    self.stop(f"signal {self._signal}")
                elif self.deadline is not None and time.monotonic() > self.deadline:
                    self.stop("the time limit is reached")
                if ended:  # nothing else lets a run start, and looking for one reads the files of all runs
                    self._start_jobs()
                if time.monotonic() - said >= self.every_s:
                    said = time.monotonic()
                    self.say(self.progress())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for job in self.jobs:
                job.process.kill()

    def stop(self, reason: str) -> None:
        """Start no further run and ask the running ones to save and end; kill them after a grace period."""
        if self.stopping is None:
            self.stopping = reason
            self.say(f"{reason}: {len(self.jobs)} runs save a checkpoint and stop")
            for job in self.jobs:
                job.process.terminate()
            self.deadline = time.monotonic() + _GRACE_S
        elif self.deadline is not None and time.monotonic() > self.deadline:
            for job in self.jobs:
                job.process.kill()

    def runs(self) -> list[Run]:
        """Return all runs, with the learning rates that are known by now."""
        return choose_rates(self.study, self.planned, self._loss_of)

    def is_finished(self, run: Run) -> bool:
        """Whether the run is trained and, if the study says so, evaluated.

        Of a search, only the run with the chosen rate is evaluated; the report shows no other. A run that was trained
        here is evaluated here: another machine may decide its rate, but has no checkpoint of it.
        """
        if not self._is_trained(run):
            return self._result_elsewhere(run) is not None
        if not self.study.evaluate or (self.folder / run.name / EVALUATION).is_file():
            return True
        return run.searched and run.rate != chosen_rate(search_of(self.planned, run.arm, self._loss_of))

    def _is_trained(self, run: Run) -> bool:
        return is_trained(run, self.folder)

    def progress(self) -> str:
        """Return one line: finished runs, rate, time left, and the state of every running one."""
        runs = [run for run in self.runs() if self.only(run)]
        finished = sum(map(self.is_finished, runs))
        states = [self._state(job) for job in self.jobs]
        elapsed = time.monotonic() - self.began
        rate = (self.spent + sum(flops for _, flops, _ in states)) / elapsed
        left = sum(run.flops for run in runs if not self.is_finished(run) and run.name not in self.failed)
        left -= sum(reached for _, _, reached in states)
        eta = clock(left / rate) if rate > 0 else "unknown"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        head = f"{clock(elapsed)}  {finished}/{len(runs)} runs finished{failed}, {rate / 1e12:.3g} TFLOP/s, {eta} left"
        return "\n".join([head, *(f"    {text}" for text, _, _ in states)])

    def _loss_of(self, run: Run) -> float | None:
        if run.name in self.failed and not self._is_trained(run):  # a failed evaluation leaves the loss as it is
            return float("nan")
        if (other := self._result_elsewhere(run)) is not None:
            return float("nan") if other["final_loss"] is None else float(other["final_loss"])
        if not self._is_trained(run):
            return None
        loss = final_loss(self.folder / run.name)
        return float("nan") if loss is None else loss  # a rate at which the run diverged decides nothing

    def _result_elsewhere(self, run: Run) -> dict[str, Any] | None:
        """Return the entry of the same run, finished on another machine; its numbers are rounded."""
        entry = self.elsewhere.get(run.name)
        if entry is None or run.rate is None or entry["rate"] is None:
            return None
        same = entry["steps"] == run.steps and same_rate(entry["rate"], run.rate)
        return entry if same else None

    def _state(self, job: Job) -> tuple[str, float, float]:
        """Return a line about a job, the FLOPs that it computed, and those that its run has behind it."""
        if job.evaluates:
            return f"{job.run.name}: evaluation", 0.0, job.run.flops
        records = [r for r in read_records(self.folder / job.run.name / "metrics.jsonl") if "lm_loss" in r]
        if not records:
            return f"{job.run.name}: starting", 0.0, 0.0
        last, per_step = records[-1], job.run.tokens_per_step * job.run.flops_per_token
        loss = last["lm_loss"] if last["lm_loss"] is not None else float("nan")
        text = f"{job.run.name}: step {last['step']}/{job.run.steps}, loss {loss:.3f}"
        text += f", {short(last['tokens_per_s'] or 0)} tokens/s"
        return text, max(0, last["step"] - job.step_before) * per_step, last["step"] * per_step

    def _start_jobs(self) -> None:
        """Fill free slots."""
        for run in self.runs():
            differs = trained_differently(run, self.folder)
            if differs and self.only(run) and run.name not in self.failed:
                self.failed[run.name] = differs
        taken = {job.slot for job in self.jobs}
        names = {job.run.name for job in self.jobs}
        for slot in (slot for slot in range(self.slots) if slot not in taken):
            if self.stopping is not None or self._signal is not None:
                break
            waiting = [
                run
                for run in self.runs()
                if run.rate is not None
                and self.only(run)
                and run.name not in names
                and run.name not in self.failed
                and not self.is_finished(run)
            ]
            if not waiting:
                break
            # The longest first, so that no slot is left with a long run at the end; a search decides what follows it.
            run = max(waiting, key=lambda run: (run.searched, run.flops))
            self._start(run, slot)
            names.add(run.name)

    def command(self, run: Run, evaluates: bool) -> list[str]:
        """Return the command line that trains or evaluates a run."""
        if not evaluates:
            return [sys.executable, "-m", "fusiontree.train", "--quiet", *run.arguments(self.folder)]
        path = self.folder / run.name
        words = ["--checkpoint", str(path), *self.study.evaluate, "--json", "--output", str(path / EVALUATION)]
        return [sys.executable, "-m", "fusiontree.evaluate", *words]

    def _start(self, run: Run, slot: int) -> None:
        path = self.folder / run.name
        path.parent.mkdir(parents=True, exist_ok=True)
        evaluates = (path / DONE).is_file()
        kernels = self.folder / "kernels"  # compiled once for all runs of the study
        changes = {"TRITON_CACHE_DIR": str(kernels / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor")}
        if self.gpus:
            changes["CUDA_VISIBLE_DEVICES"] = name_of_gpu(slot % self.gpus)
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        log = path.with_name(f"{path.name}.log").open("ab")
        log_begins = log.tell()
        process = subprocess.Popen(
            self.command(run, evaluates),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment_with_defaults(OMP_NUM_THREADS=str(threads)), **changes},
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the runs in order
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        records = [] if evaluates else read_records(path / "metrics.jsonl")
        before = max((r["step"] for r in records), default=0)
        self.jobs.append(Job(run, slot, process, log, evaluates, log_begins, step_before=before))
        begins = "evaluated" if evaluates else f"resumed after step {before}" if before else "started"
        self.say(f"{run.name}: {begins} ({run.steps} steps, {short(run.tokens)} tokens)")

    def _finish(self, job: Job) -> None:
        self.jobs.remove(job)
        job.log.close()
        path = self.folder / job.run.name
        code, seconds = job.process.returncode, time.monotonic() - job.began
        self.spent += self._state(job)[1]
        if code == 0 and not job.evaluates:
            mark_trained(job.run, self.folder, seconds, self.slots // self.gpus if self.gpus else 1)
            loss = final_loss(path)
            text = "not finite" if loss is None else f"{loss:.4f}"
            self.say(f"{job.run.name}: finished in {clock(seconds)}, loss {text}")
        elif code == 0:
            self.say(f"{job.run.name}: evaluated in {clock(seconds)}")
        elif code == _STOPPED or self.stopping is not None:
            self.interrupted += 1
            if self.stopping is None:  # another program stopped the run; the next start of the study resumes it
                self.failed[job.run.name] = "stopped by a signal"
        else:
            self.failed[job.run.name] = f"exit code {code}: {_last_line(Path(job.log.name), job.log_begins)}"
            self.say(f"{job.run.name}: FAILED, {self.failed[job.run.name]} (see {job.log.name})")

    def _stop_signal(self, number: int, _: object) -> None:
        """Note a signal; :meth:`run_all` acts on it when no run is about to start and nothing is being printed."""
        self._signal = signal.Signals(number).name


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to a run whose study was killed: the run saves a checkpoint and ends."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


def _last_line(log: Path, begin: int) -> str:
    """Return the last line behind byte ``begin`` of a log that names an error, else the last line."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no output"])[-1][:300]
