"""The processes of a job and their groups; no other module creates process groups.

``Layout`` knows this process's device, its sequences and tokens of a batch, and the ranks to sum a value over. Ranks
along each mesh axis hold: dp (data parallel) different sequences; cp (context parallel) different chunks of the same
sequences; tp (tensor parallel) different heads of the same chunk inside the mixers, and different tokens of the chunk
between the mixers. tp is innermost, so its ranks are neighbours: rank = (dp_rank * cp + cp_rank) * tp + tp_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusiontree.utils.cuda_graph import release_graphs
from fusiontree.utils.device import choose_device
from fusiontree.utils.environment import check_meeting_point, keep_graph_buffers_local, process_place, rendezvous_given
from fusiontree.utils.errors import UserError

T = TypeVar("T")


def gather_objects(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return the object of every rank of ``group``, in rank order; a collective call.

    Args:
        mine: this rank's object, which must be picklable.
        group: a gloo group; None for a single process.
    """
    if group is None:
        return [mine]
    everyone = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


class Layout:
    """This process's position in the device mesh. Use it as a context manager, which ends the process groups."""

    def __init__(
        self,
        device: str = "auto",
        timeout_s: float = 1800.0,
        *,
        tp: int = 1,
        cp: int = 1,
        shard_size: int | None = None,
    ) -> None:
        """Join the job's process group (nccl on GPUs, gloo on CPUs; one process alone needs no rendezvous).

        :func:`fusiontree.parallel.validate.check_layout` must have accepted the sizes.

        Args:
            device: auto | cuda | cpu.
            timeout_s: how long a collective may wait for its peers.
            tp: tensor parallel size.
            cp: context parallel size.
            shard_size: ranks that share one copy of the parameters under fsdp2; None means all.
        """
        self.place = process_place()
        check_meeting_point(self.place)
        self.device = choose_device(device, self.place.local_rank, "training.device")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.backend = "nccl" if self.device.type == "cuda" else "gloo"
        keep_graph_buffers_local()
        timeout = timedelta(seconds=timeout_s)
        world = self.place.world_size
        alone = world == 1 and not rendezvous_given()
        store = dist.HashStore() if alone else None
        dist.init_process_group(self.backend, store=store, rank=self.place.rank, world_size=world, timeout=timeout)
        assert world % (tp * cp) == 0, f"{world} processes, tp {tp}, cp {cp}"
        self.tp_size, self.cp_size, self.dp_size = tp, cp, world // (tp * cp)
        self.shard_size = shard_size or world
        self._copies: dict[tuple[bool, bool], DeviceMesh] = {}
        self.mesh: DeviceMesh = self._mesh(dp=self.dp_size, cp=cp, tp=tp)
        self._dp_cp_mesh = self._mesh(dp_cp=self.dp_size * cp, tp=tp)["dp_cp"] if tp * cp > 1 else self.mesh["dp"]
        self._world_mesh = self._mesh(world=world)
        self.dp_rank, self.cp_rank, self.tp_rank = map(self.mesh.get_local_rank, ("dp", "cp", "tp"))
        """Indices of this process's part of every batch, of its chunk of the sequences, and of its share of the heads
        (between the mixers: of the chunk's tokens)."""
        self.dp_group, self.cp_group, self.tp_group = map(self.mesh.get_group, ("dp", "cp", "tp"))
        """Ranks, in order, that hold different sequences; chunks of the same sequences; heads of the same tokens."""
        self.dp_cp_group, self.dp_cp_rank = self._dp_cp_mesh.get_group(), self._dp_cp_mesh.get_local_rank()
        """Ranks that compute the same heads on different tokens; tp-split parameters are sharded over them."""
        self.row_group = self._mesh(dp=self.dp_size, row=cp * tp)["row"].get_group()
        """Ranks that hold the same sequences (cp x tp); sums over a sequence's tokens are reduced over them."""
        self.world_group = self._world_mesh.get_group()
        """All ranks (dp x cp x tp); parameters that tp does not split are sharded over them."""
        self.is_main = self.place.is_main
        """True on the one process that writes files and prints."""
        # For CPU code such as writing files: gloo stays off the GPU's stream, and NCCL's time-outs do not apply.
        self.cpu_group = dist.new_group(backend="gloo", timeout=timeout)
        # Checkpoint threads communicate while training does; on a common group their messages would mix.
        self.checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)

    def _mesh(self, **axes: int) -> DeviceMesh:
        return init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def parameter_group(self, tp_sharded: bool) -> dist.ProcessGroup:
        """Return the ranks to reduce a parameter's gradient over: dp x cp if tp splits it, else dp x cp x tp."""
        return self.dp_cp_group if tp_sharded else self.world_group

    def parameter_mesh(self, shard: bool, tp_sharded: bool = False) -> DeviceMesh:
        """Return the mesh for ``fully_shard``.

        Args:
            shard: shard over groups of ``shard_size`` ranks and replicate between the groups; otherwise replicate the
                parameters on each rank.
            tp_sharded: for parameters that are already split over tp: the mesh is dp x cp; otherwise dp x cp x tp.
        """
        flat, tp = (self._dp_cp_mesh, self.tp_size) if tp_sharded else (self._world_mesh, 1)
        if shard and self.shard_size == self.place.world_size:
            return flat
        key = (shard, tp > 1)
        if key not in self._copies:
            ranks = self.shard_size // tp if shard else 1
            mesh = self._mesh(replicate=flat.size() // ranks, shard=ranks, tp=tp)
            self._copies[key] = mesh["replicate", "shard"]
        return self._copies[key]

    def sum_over_shards(self, square: torch.Tensor) -> torch.Tensor:
        """Sum the squares of the ranks' gradient shards, counting each element once; ``square`` is an fp64 scalar.

        Exactly one rank of the group summed over owns each gradient element: tp-split parameters are sharded over
        dp x cp within their tp rank, all others over dp x cp x tp. So the plain sum of local squares is the global
        squared norm. Examples: under (dp, cp, tp) = (2, 2, 1) each rank owns a quarter of every parameter; under
        (1, 2, 2) and (2, 1, 2) half of its half of tp-split parameters and a quarter of the others; under (1, 1, 4) all
        of its quarter of tp-split parameters. ``shard_size`` makes copies, so the sum is over the ranks that share one
        copy; these include all tp ranks.
        """
        group, size = self.world_group, self.place.world_size
        if self.shard_size != size:
            group, size = self.parameter_mesh(shard=True).get_group("shard"), self.shard_size
        if size > 1:
            dist.all_reduce(square, group=group)
        return square

    def sum_over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` in place over the ranks that hold different sequences (dp)."""
        if self.dp_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.dp_group)
        return values

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` in place over the ranks with losses of different tokens (dp x cp).

        Every rank gets the same bits, so all ranks decide alike: separate sums in each dp x cp group could differ
        between tp ranks in the last digit.
        """
        if self.tp_rank > 0:
            values.zero_()  # count the tokens once, on tp rank 0
        return self.sum_over_ranks(values)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum ``values`` in place over all ranks."""
        if self.place.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.world_group)
        return values

    def greatest(self, value: int) -> int:
        """Return the greatest ``value`` of all ranks; a collective call of the CPUs, which waits for no device."""
        if self.place.world_size == 1:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return int(values)

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's ``text``, in rank order; a collective call."""
        return gather_objects(text, self.cpu_group)

    def on_main_rank(self, work: Callable[[], str | None]) -> str:
        """Run ``work`` on the main rank alone and return its text on every rank; a collective call.

        Raises:
            UserError: ``work`` raised it; raised on every rank.
        """
        result = [("", "")]  # answer and refusal
        if self.is_main:
            try:
                result = [(work() or "", "")]
            except UserError as error:
                result = [("", str(error))]
        dist.broadcast_object_list(result, src=0, group=self.cpu_group)
        answer, refusal = result[0]
        if refusal:
            raise UserError(refusal)
        return answer

    def barrier(self) -> None:
        """Wait until every process has called this."""
        dist.barrier(group=self.cpu_group)

    def close(self) -> None:
        """End the process groups, and the CUDA graphs that may use them."""
        release_graphs()
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Layout:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the peers may wait in a collective; destroying NCCL groups would wait for them too.
        if kind is None or self.place.world_size == 1:
            self.close()


@contextmanager
def temporary_group(device: torch.device, store: dist.Store, rank: int, size: int, timeout_s: float) -> Iterator[None]:
    """Initialize the default process group for the ``with`` block and destroy it afterwards; none may exist before.

    Args:
        device: decides the backend: nccl on GPUs, gloo on CPUs.
        store: rendezvous of the processes; must hold no keys of another group.
        rank: of this process in the group.
        size: number of processes in the group.
        timeout_s: how long a collective may wait for its peers.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except BaseException:
        # A failed start leaves torch's group counter advanced: this rank's next group would get a name its peers lack.
        dist.distributed_c10d._world.group_count = 0
        raise
    try:
        yield
    finally:
        dist.destroy_process_group()
