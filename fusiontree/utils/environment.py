"""Reads and sets environment variables, for all other modules: rank, launcher, Slurm job, libraries.

torchrun, deepspeed and Slurm each use their own variables for a process's rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessPlace:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """True on the process that writes files and prints."""
        return self.rank == 0


def process_place() -> ProcessPlace:
    """Return this process's place, from torchrun's or deepspeed's variables, else from Slurm's, else alone.

    Raises:
        ValueError: the variables contradict each other.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        place = ProcessPlace(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]),
        )
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" in env:
        place = ProcessPlace(
            rank=int(env["SLURM_PROCID"]),
            world_size=int(env["SLURM_NTASKS"]),
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=_tasks_of_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"])),
        )
    else:
        place = ProcessPlace(rank=0, world_size=1, local_rank=0, local_world_size=1)
    if not 0 <= place.rank < place.world_size:
        raise ValueError(f"RANK={place.rank} is outside WORLD_SIZE={place.world_size}; check the launcher's variables")
    return place


def _tasks_of_node(counts: str, node: int) -> int:
    """Return a node's number of tasks from Slurm's list of them, such as ``4(x2),3``."""
    tasks = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or "1")
    return tasks[node]


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with some variables set, for a process that it starts."""
    return {**os.environ, **changes}


def environment_with_defaults(**defaults: str) -> dict[str, str]:
    """Return this process's environment for a process that it starts, with ``defaults`` for variables not set."""
    return {**defaults, **os.environ}


def rendezvous_given() -> bool:
    """True if a launcher set the address where the ranks meet (``MASTER_ADDR`` and ``MASTER_PORT``)."""
    return "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def slurm_job() -> tuple[str, int]:
    """Return the Slurm job's id and how often it was requeued; ``("", 0)`` outside Slurm."""
    return os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def meeting_point() -> tuple[str, int] | None:
    """Return address and port where the job's processes meet, or None if no launcher set them."""
    return (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if rendezvous_given() else None


def fail_on_nccl_timeout() -> None:
    """Make a time-out of NCCL an error of the waiting call rather than the end of the process."""
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"


def keep_flight_record() -> None:
    """Make NCCL's process groups record their last collectives, unless the user set this. Call before the first."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives


def flight_record() -> bytes | None:
    """Return NCCL's record of this process's last collectives; None on the CPU or with an older torch.

    The bytes are what ``torchfrtrace`` reads (a pickle; only open your own).
    """
    import torch

    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    return bytes(dump()) if dump and torch.distributed.is_nccl_available() else None


def limit_tokenizer_threads(threads: int) -> None:
    """Set how many threads the tokenizers library encodes with; call before its first use in this process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def wandb_server() -> str:
    """Return the address of the wandb server that this process would talk to."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def tell_deepspeed(local_rank: int, device_type: str) -> None:
    """Tell DeepSpeed, which reads it from the environment alone, this process's device; call before importing it."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ["DS_ACCELERATOR"] = device_type


def keep_tuning() -> None:
    """Let Triton store the fastest variant of each kernel in its cache folder, unless the user set this.

    Call before the kernels are imported. Without it every process tunes mamba_ssm's scan for one to two minutes.
    """
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
