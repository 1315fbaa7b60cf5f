"""The processes of a job and their groups: the one place where process groups are made.

``Layout`` says which device this process computes on, which rows of a batch are its own, and over whom a value
is summed. Mesh axes: dp (data parallel).
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusiontree.utils.environment import ProcessPlace, process_place, rendezvous_given
from fusiontree.utils.errors import UserError


def choose_device(wanted: str, place: ProcessPlace) -> torch.device:
    """Return this process's device for ``training.device`` = auto | cuda | cpu.

    Raises:
        UserError: a GPU is asked for and absent, or there are more local processes than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"this torch ({torch.__version__}) is built without CUDA" if built is None else "no GPU is visible"
        raise UserError(f"training.device is cuda, but {reason}; use training.device=cpu or a machine with a GPU")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise UserError(
            f"local rank {place.local_rank} has no GPU: this machine shows {count}; start at most {count} "
            f"processes a node or set training.device=cpu"
        )
    return torch.device("cuda", place.local_rank)


class Layout:
    """This process's place on the device mesh. Use as a context manager: leaving it ends the process groups."""

    def __init__(self, device: str = "auto", timeout_s: float = 1800.0) -> None:
        """Join the job's process group (nccl on GPUs, gloo on CPUs; one process alone needs no rendezvous).

        Args:
            device: auto | cuda | cpu.
            timeout_s: how long a collective may wait for its peers.
        """
        self.place = process_place()
        self.device = choose_device(device, self.place)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if self.place.world_size == 1 and not rendezvous_given():
            store = dist.HashStore()
            dist.init_process_group(self.backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(
                self.backend, rank=self.place.rank, world_size=self.place.world_size, timeout=timeout
            )
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, (self.place.world_size,), mesh_dim_names=("dp",))
        # Files are written by CPU code; a gloo group keeps that off the GPU's stream and its time-outs apart.
        self.cpu_group = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def dp_rank(self) -> int:
        """This process's index among the data parallel ranks."""
        return self.mesh.get_local_rank("dp")

    @property
    def dp_size(self) -> int:
        """Number of data parallel ranks: how many parts a global batch is split into."""
        return self.mesh["dp"].size()

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.place.is_main

    def parameter_mesh(self, shard: bool) -> DeviceMesh:
        """Return the mesh for ``fully_shard``: sharded over all data parallel ranks, or whole on each of them."""
        if shard:
            return self.mesh["dp"]
        return init_device_mesh(self.device.type, (self.dp_size, 1), mesh_dim_names=("replicate", "shard"))

    def sum_over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` in place over the ranks that read different rows."""
        if self.dp_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.mesh.get_group("dp"))
        return values

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` in place over the ranks that hold different tokens."""
        return self.sum_over_rows(values)  # every rank holds whole rows

    def barrier(self) -> None:
        """Wait until every process is here."""
        dist.barrier(group=self.cpu_group)

    def close(self) -> None:
        """End the process groups."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Layout:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the peers may wait in a collective; destroying NCCL groups would wait for them too.
        if kind is None:
            self.close()
