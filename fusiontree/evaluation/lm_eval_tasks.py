"""Tasks of lm-evaluation-harness on a checkpoint, as records like those of our tasks."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from fusiontree.evaluation.lm_eval_model import FusionTreeLM

Record = dict[str, Any]


def require_lm_eval() -> None:
    """Check that the harness is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'fusiontree[lm-eval]'")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks, groups and tags of the harness by name, or YAML files of tasks."""

    names: Sequence[str]
    num_fewshot: int | None = None
    """Examples before each question; None leaves each task's number."""
    limit: float | None = None
    """Questions of each task, or their share if below 1; None means all."""
    include_path: Sequence[Path] = ()
    """Folders of further task files."""

    def check(self) -> None:
        """Check names and sizes; reads the harness's list of tasks.

        Raises:
            UserError: the harness is not installed, a task is unknown, or a size is wrong.
        """
        require_lm_eval()
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num-fewshot {self.num_fewshot}: it must be at least 0")
        if self.limit is not None and self.limit <= 0:
            raise UserError(f"--limit {self.limit}: it must be above 0")
        for folder in self.include_path:
            if not folder.is_dir():
                raise UserError(f"--include-path {folder}: there is no such folder")
        if not self.names:
            raise UserError("--lm-eval names no task; give names with commas between them, such as hellaswag,arc_easy")
        known = self._manager.all_tasks
        for name in self.names:
            if name not in known and not Path(name).is_file():
                raise UserError(
                    f"--lm-eval: the harness knows no task '{name}'{nearest(name, known)}; 'lm_eval ls tasks' lists "
                    f"them, and --include-path names folders of further task files"
                )

    def run(self, lm: FusionTreeLM) -> list[Record]:
        """Return a record per task, filter and metric; an empty list on all ranks but the first.

        Raises:
            UserError: a task's data cannot be loaded, or a request is wrong.
        """
        import lm_eval

        with contextlib.redirect_stdout(sys.stderr):  # standard output is for our results
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(self.names),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=self._manager,
                batch_size=lm.responder.batch_size,
                device=str(lm.device),
                log_samples=False,
            )
        return [] if results is None or lm.rank else list(records(results))

    def settings(self) -> Record:
        """Return what was asked for, and the harness's version."""
        import lm_eval

        return {
            "version": lm_eval.__version__,
            "tasks": list(self.names),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "include_path": [str(folder) for folder in self.include_path],
        }

    @cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        class Tasks(TaskManager):
            """Says which tasks could not be loaded, and why."""

            def load(self, task_list: Any) -> Any:
                try:
                    return super().load(task_list)
                except Exception as error:  # of datasets, httpx, huggingface_hub, or of a task's own code
                    raise UserError(_not_loaded(task_list, error)) from error

        folders = [str(folder) for folder in self.include_path]
        if folders:  # the list of the harness's own tasks takes 16 s of CPU time
            own = Tasks(include_path=folders, include_defaults=False)
            if set(self.names) <= set(own.all_subtasks):
                return own
        return Tasks(include_path=folders or None)


def _not_loaded(names: Any, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    return (
        f"the data of {', '.join(map(str, names))} cannot be loaded ({type(error).__name__}: {reason}). Most tasks "
        f"download a dataset from huggingface.co at first use: run once with network access and keep the folder "
        f"HF_HOME, or write a task on local files (--include-path)"
    )


def records(results: dict[str, Any]) -> Iterator[Record]:
    """Yield a record per task or group, filter and metric of the harness's results."""
    for name, metrics in (results["results"] | results.get("groups", {})).items():
        for key, value in metrics.items():
            metric, comma, chain = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chain}")
            yield {
                "task": name,
                "version": results["versions"].get(name),
                "shots": results["n-shot"].get(name),
                "filter": chain,
                "metric": metric,
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
            }
