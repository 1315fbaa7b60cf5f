"""A process's place from complete, partial, empty and contradictory variables of launchers."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from fusiontree.train import main
from fusiontree.utils.environment import (
    ProcessPlace,
    check_meeting_point,
    meeting_point,
    process_place,
    rendezvous_given,
    slurm_job,
)
from fusiontree.utils.errors import UserError
from fusiontree.utils.peers import host_address
from tests.config.test_load import BASE

ROOT = Path(__file__).resolve().parent.parent.parent
ALONE = (0, 1, 0, 1)
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8"}
STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    starts = ("SLURM_", "OMPI_", "PMI_", "MPI_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    for name in [name for name in os.environ if name.startswith(starts)]:
        monkeypatch.delenv(name)
    return monkeypatch


def place(env: pytest.MonkeyPatch, variables: dict[str, str]) -> tuple[int, ...]:
    for name, value in variables.items():
        env.setenv(name, value)
    found = process_place()
    return found.rank, found.world_size, found.local_rank, found.local_world_size


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, ALONE),
        ({"WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "0"}, ALONE),
        ({"RANK": " 2 ", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, (2, 4, 0, 2)),
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_LOCALID": "0", "LOCAL_WORLD_SIZE": ""}, (2, 4, 0, 4)),
        ({**BATCH, "MASTER_ADDR": "10.0.0.1"}, ALONE),  # a batch script that sets the address for its srun
        ({**BATCH, "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # an interactive step
        (STEP, (5, 8, 1, 4)),
        ({**STEP, "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8"}, (5, 8, 1, 4)),  # a step of a part of the job
        ({**STEP, "RANK": "", "WORLD_SIZE": ""}, (5, 8, 1, 4)),
        (OPEN_MPI, (3, 4, 1, 4)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (3, 4, 1, 2)),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (3, 4, 1, 2)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, ALONE),
    ],
)
def test_what_is_understood(env: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, ...]) -> None:
    assert place(env, variables) == expected


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 and RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "rank 2 is outside a world of 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "outside a world of 0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', not a number"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "local rank 3 of 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "4 processes on this node"),
        ({**STEP, "SLURM_NODEID": ""}, "do not say which of its node"),
        ({**STEP, "SLURM_NODEID": "2"}, "do not say which of its node"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "four"}, "no list such as"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "ranks are incomplete"),
    ],
)
def test_what_is_refused(env: pytest.MonkeyPatch, variables: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        place(env, variables)


def test_the_entry_gives_one_line(env: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(BASE)
    for name, value in (BATCH | {"MASTER_ADDR": "10.0.0.1"}).items():
        env.setenv(name, value)
    assert main(["--config", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert "seq_len: 64" in capsys.readouterr().out
    env.setenv("RANK", "x")
    assert main(["--config", str(tmp_path / "run.yaml"), "--print-config"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the environment variable RANK is 'x'")


def test_several_processes_need_a_meeting_point(env: pytest.MonkeyPatch) -> None:
    check_meeting_point(ProcessPlace(0, 1, 0, 1))
    env.setenv("MASTER_ADDR", "node1")
    assert not rendezvous_given()
    for port, named in (
        ("", "MASTER_PORT is not set"),
        ("x", "not a port"),
        ("0", "not a port"),
        ("70000", "not a port"),
    ):
        env.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=named):
            check_meeting_point(ProcessPlace(1, 2, 1, 2))
    env.setenv("MASTER_PORT", "29500")
    check_meeting_point(ProcessPlace(1, 2, 1, 2))
    assert meeting_point() == ("node1", 29500)


def test_an_address_of_ipv6(env: pytest.MonkeyPatch) -> None:
    for address in ("::1", "[::1]"):
        env.setenv("MASTER_ADDR", address)
        env.setenv("MASTER_PORT", "29500")
        assert meeting_point() == ("::1", 29500)
        assert host_address() in (f"{socket.gethostname()} ::1", f"{socket.gethostname()} 127.0.0.1")


def test_empty_variables_of_a_job(env: pytest.MonkeyPatch) -> None:
    assert slurm_job() == ("", 0)
    env.setenv("SLURM_JOB_ID", "12")
    env.setenv("SLURM_RESTART_COUNT", "")
    assert slurm_job() == ("12", 0)


@pytest.mark.parametrize(
    ("script", "code", "named"),
    [
        ("address_towards ::1", 0, "::1"),
        ("address_towards '[::1]'", 0, "::1"),
        ("address_towards 127.0.0.1", 0, "127.0.0.1"),
        ("address_towards no.such.host.invalid", 1, "error: no route to the first node at MASTER_ADDR=no.such"),
        ("NNODES=two place_in_slurm", 2, "error: NNODES is 'two', not a number"),
        ("SLURM_JOB_ID=5 place_in_slurm", 2, "set SLURM_JOB_NODELIST"),
        ("MASTER_ADDR='[fe80::1]' && place_in_slurm && echo $MASTER_ADDR", 0, "fe80::1"),
        ("MASTER_ADDR= && place_in_slurm && echo ${MASTER_ADDR-unset}", 0, "unset"),
        ("stop_without 'two nodes' MASTER_ADDR NODE_RANK", 2, "error: two nodes: set MASTER_ADDR"),
    ],
)
def test_launchers_read_their_variables(env: pytest.MonkeyPatch, script: str, code: int, named: str) -> None:
    command = f"set -uo pipefail; source {ROOT}/launchers/environment.sh; {script}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    assert (done.returncode, len(said.splitlines())) == (code, 1), said
    assert said.startswith(named) or named in said


@pytest.mark.parametrize(
    ("options", "worlds"),
    [
        ("", "1"),
        ("--nodes=2 --gpus-per-node=8", "16"),
        ("-N2 --gpus-per-node h100:4", "8"),
        ("--nodes=1-3 --gpus-per-node=h100", "1 2 3"),
        ("--gres=gpu:h100", "1"),
        ("--gres=gpu:2,nvme:1", "2"),
        ("--gres=nvme:3,gpu:h100:4 -N 2", "8"),
        ("--gres=nvme:3", "1"),
        ("--gpus=2", "2"),
        ("-G h100:8 --nodes=2", "8"),
        ("--ntasks=2", "2"),
        ("-n8 -N2", "8"),
        ("-n 1 --gpus-per-node=8", "8"),  # one launcher on the node
        ("--ntasks-per-node=4 --gpus-per-node=8", "4"),
        ("--ntasks=8 --ntasks-per-node=4", "8"),  # on two nodes, though no option says so
        ("-n 9 --ntasks-per-node=4 -N 3", "12"),
        ("--gpus=h100:2,a100:4", "6"),
        ("--gres=gpu:h100:2,gpu:a100:2,nvme:1 -N2", "8"),
        ("--gres=gres/gpu:4", "4"),
        ("--gres=gpu=4", "4"),
        ("'--gres=gpu:2(S:0-1)'", "2"),
        ("--gres=none", "1"),
        ("--gpus-per-task=1 --ntasks=8 -N2", "8"),
        ("--tres-per-task=gres/gpu:1 -n8 -N2", "8"),
        ("--exclusive --cpus-per-task=4", "1"),
    ],
)
def test_the_processes_of_a_job_are_read_from_its_options(env: pytest.MonkeyPatch, options: str, worlds: str) -> None:
    for name in ("SBATCH_GRES", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_OPTIONS", "PROCESSES"):
        env.delenv(name, raising=False)
    command = f"source {ROOT}/slurm/functions.sh; options=({options}); echo $(world_sizes)"
    done = subprocess.run(["bash", "-uc", command], capture_output=True, text=True)
    assert done.stdout.strip() == worlds, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "options", "worlds"),
    [
        ("SBATCH_GPUS_PER_NODE", "h100:8", "--nodes=2", "16"),
        ("SBATCH_GRES", "gpu:4", "", "4"),
        ("SBATCH_GPUS", "2", "", "2"),
        ("SBATCH_GPUS_PER_NODE", "8", "--gpus-per-node=4", "4"),
        ("SBATCH_OPTIONS", "--nodes=2 --gpus-per-node=8", "--nodes=1", "8"),
        ("PROCESSES", "3", "--nodes=2 --gpus-per-node=8", "6"),
    ],
)
def test_variables_that_sbatch_reads_count_before_options(
    env: pytest.MonkeyPatch, name: str, value: str, options: str, worlds: str
) -> None:
    env.setenv(name, value)
    command = f"source {ROOT}/slurm/functions.sh; options=({options}); echo $(world_sizes)"
    done = subprocess.run(["bash", "-uc", command], capture_output=True, text=True)
    assert done.stdout.strip() == worlds, done.stderr


@pytest.mark.parametrize("options", ["--gpus=3 --nodes=2", "-G 8 -N 1-3", "--nodes=two", "--ntasks=x", "--nodes=1,2"])
def test_options_that_give_no_number_of_processes_are_refused(env: pytest.MonkeyPatch, options: str) -> None:
    env.delenv("PROCESSES", raising=False)
    command = f"source {ROOT}/slurm/functions.sh; options=({options}); world_sizes"
    done = subprocess.run(["bash", "-uc", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
