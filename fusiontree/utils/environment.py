"""Reads and sets environment variables, for all other modules: rank, launcher, Slurm job, libraries.

torchrun, deepspeed and Slurm each use their own variables for a process's rank.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from fusiontree.utils.errors import UserError


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
    """Return this process's place: from torchrun's or deepspeed's variables, else from Slurm's or MPI's, else alone.

    An empty variable counts as one that is not set. A variable of another program, such as the tasks of a batch script
    that is itself no task, is not taken for a launcher's.

    Raises:
        UserError: the variables of a launcher are incomplete, contradict each other or are no numbers.
    """
    place = _torchrun_place() or _slurm_place() or _mpi_place() or ProcessPlace(0, 1, 0, 1)
    if not 0 <= place.rank < place.world_size:
        raise UserError(f"rank {place.rank} is outside a world of {place.world_size}; {_CHECK}")
    if not 0 <= place.local_rank < place.local_world_size <= place.world_size:
        raise UserError(
            f"local rank {place.local_rank} of {place.local_world_size} processes on this node does not fit a world of "
            f"{place.world_size}; {_CHECK}"
        )
    return place


def check_meeting_point(place: ProcessPlace) -> None:
    """Check that the processes of a job know where to meet.

    Raises:
        UserError: MASTER_ADDR or MASTER_PORT is not set, though there are several processes, or the port is none.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT") if place.world_size > 1 else ():
        if _text(name) is None:
            raise UserError(
                f"this is one of {place.world_size} processes, and the environment variable {name} is not set, so they "
                f"cannot meet; start them with launchers/torchrun.sh, launchers/deepspeed.sh or launchers/srun.sh"
            )
    meeting_point()


_CHECK = "check the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, SLURM_*, OMPI_*)"


def _text(name: str) -> str | None:
    """Return a variable; None if it is not set or empty."""
    return os.environ.get(name, "").strip() or None


def _number(name: str, *others: str) -> int | None:
    """Return the first variable of these that is set, as a number from 0; None if none is set.

    Raises:
        UserError: it is no such number.
    """
    for known in (name, *others):
        text = _text(known)
        if text is not None:
            if not re.fullmatch(r"[0-9]+", text):
                raise UserError(f"the environment variable {known} is '{text}', not a number from 0; set or unset it")
            return int(text)
    return None


def _torchrun_place() -> ProcessPlace | None:
    """Return the place by RANK and WORLD_SIZE, None if neither says that there are several processes."""
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if rank is None or world_size is None:
        given, missing = ("RANK", "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", "RANK")
        value = rank if world_size is None else world_size
        if value is not None and value > (0 if given == "RANK" else 1):
            raise UserError(
                f"the environment variable {given} is {value} and {missing} is not set; start the processes with a "
                f"launcher, or unset {given} to run one process"
            )
        return None
    local_rank = _number("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    if local_rank is None:
        if world_size > 1:
            raise UserError(
                f"RANK is {rank} of WORLD_SIZE {world_size}, and LOCAL_RANK is not set, so the GPU of this process is "
                f"unknown; set LOCAL_RANK to its number on its node, from 0"
            )
        local_rank = 0
    return ProcessPlace(rank, world_size, local_rank, _number("LOCAL_WORLD_SIZE", "LOCAL_SIZE") or world_size)


def _slurm_place() -> ProcessPlace | None:
    """Return the place in a step that srun started; None in a batch script or an allocation's shell."""
    rank, counts = _number("SLURM_PROCID"), _text("SLURM_STEP_TASKS_PER_NODE")
    if rank is None or counts is None:
        return None
    tasks = _tasks_of_nodes(counts)
    node, local_rank = _number("SLURM_NODEID"), _number("SLURM_LOCALID")
    world_size = _number("SLURM_STEP_NUM_TASKS") or sum(tasks)
    if world_size == 1:
        return None
    if node is None or local_rank is None or node >= len(tasks):
        raise UserError(
            f"this is task {rank} of {world_size} of a Slurm step, and SLURM_NODEID, SLURM_LOCALID and "
            f"SLURM_STEP_TASKS_PER_NODE '{counts}' do not say which of its node; start it with srun"
        )
    return ProcessPlace(rank, world_size, local_rank, tasks[node])


def _mpi_place() -> ProcessPlace | None:
    """Return the place by the variables of Open MPI's or MPICH's mpirun; None outside them."""
    world_size = _number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") or 1
    if world_size == 1:
        return None
    rank = _number("OMPI_COMM_WORLD_RANK", "PMI_RANK")
    local_rank = _number("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    if rank is None or local_rank is None:
        raise UserError(
            f"mpirun started {world_size} processes, and the variables of their ranks are incomplete; start them with "
            f"launchers/torchrun.sh"
        )
    return ProcessPlace(
        rank, world_size, local_rank, _number("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS") or world_size
    )


def _tasks_of_nodes(counts: str) -> list[int]:
    """Return each node's number of tasks from Slurm's list of them, such as ``4(x2),3``."""
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is '{counts}', no list such as 4(x2),3; start with srun")
        tasks += [int(match.group(1))] * int(match.group(2) or 1)
    return tasks


def expand_path(text: str) -> str:
    """Return a path or URL of a user with ``~``, ``$NAME`` and ``${NAME}`` replaced, the one rule for all paths.

    A relative path stays relative to the working directory. What exists under its literal name is meant literally; a
    ``pipe:`` command is the shell's to expand.

    Raises:
        UserError: the path is empty, or names a variable that is not set or a user that does not exist.
    """
    if not text.strip() or "\0" in text:
        raise UserError("the path is empty or holds a zero byte; give a folder, a file, or leave the setting out")
    if text.startswith("pipe:") or (text[0] != "~" and "$" not in text) or os.path.exists(text):
        return text

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if not os.environ.get(name):
            raise UserError(f"'{text}' names the variable {name}, which is not set; export it or write the path")
        return os.environ[name]

    expanded = os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, text))
    if expanded.startswith("~"):
        raise UserError(f"'{text}' names the home of a user that does not exist; write the path")
    return expanded


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with some variables set, for a process that it starts."""
    return {**os.environ, **changes}


def environment_with_defaults(**defaults: str) -> dict[str, str]:
    """Return this process's environment for a process that it starts, with ``defaults`` for variables not set."""
    return {**defaults, **os.environ}


def name_of_gpu(index: int) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that shows a process only the GPU that is ``index`` here."""
    shown = _text("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[index].strip() if shown else str(index)


def rendezvous_given() -> bool:
    """True if a launcher set the address where the ranks meet (``MASTER_ADDR`` and ``MASTER_PORT``)."""
    return _text("MASTER_ADDR") is not None and _text("MASTER_PORT") is not None


def slurm_job() -> tuple[str, int]:
    """Return the Slurm job's id, with the cluster's name, and how often it was requeued; ``("", 0)`` outside Slurm."""
    job, cluster = _text("SLURM_JOB_ID"), _text("SLURM_CLUSTER_NAME")
    return f"{job}@{cluster}" if job and cluster else job or "", _number("SLURM_RESTART_COUNT") or 0


def meeting_point() -> tuple[str, int] | None:
    """Return address and port where the job's processes meet, or None if no launcher set them.

    Raises:
        UserError: the port is no number from 1 to 65535.
    """
    address, port = _text("MASTER_ADDR"), _text("MASTER_PORT")
    if address is None or port is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise UserError(f"the environment variable MASTER_PORT is '{port}', not a port from 1 to 65535")
    return address.strip("[]"), int(port)  # brackets of an IPv6 address belong to URLs


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


def keep_graph_buffers_local() -> None:
    """Let NCCL not register the buffers of recorded collectives, unless the user set this. Call before the first.

    Ranks would have to record at the same moment: NCCL registers a buffer with all of them together.
    """
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
