"""A private Slurm on this machine: one controller, two node daemons, a munge of its own, all in one folder.

Used as ``with SlurmCluster(folder) as cluster: cluster.run("sinfo")``. Needs Debian's slurm-wlm and munge and root.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")


def missing_programs() -> list[str]:
    """Return the programs for a cluster that this machine lacks, and root if this process is not root."""
    missing = [p for p in PROGRAMS if shutil.which(p) is None and not Path("/usr/sbin", p).exists()]
    return missing + ([] if os.geteuid() == 0 else ["root"])


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SlurmCluster:
    """Starts the daemons on entry and kills them on exit."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        """Prepare a cluster of ``nodes`` nodes of ``cpus`` pretended CPUs, with all its files under ``folder``."""
        self.folder = folder.resolve()
        self.names = [f"n{i}" for i in range(nodes)]
        self.cpus = cpus
        self.conf = self.folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: free_port() for name in self.names}

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this cluster."""
        return os.environ | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def _write_files(self) -> None:
        for sub in ("state", "spool", "log", "munge"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname()
        # Clusters of two test processes must not number their jobs alike: the port of a job's ranks follows from it.
        lines = f"""
ClusterName=fusiontree
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
FirstJobId={1 + os.getpid() % 10_000}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=5
JobRequeue=1
SchedulerParameters=sched_interval=5,bf_interval=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/%n.log
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""".strip().splitlines()
        lines += [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[name]} "
            f"CPUs={self.cpus} State=UNKNOWN"
            for name in self.names
        ]
        self.conf.write_text("\n".join(lines) + "\n")

    def _start(self, name: str, *command: str) -> None:
        path = shutil.which(command[0], path=self.environment["PATH"])
        assert path, command[0]
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *command[1:]], stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        """Start one node daemon."""
        self._start(name, "slurmd", "-D", "-N", name, "-f", str(self.conf))

    def kill_node(self, name: str) -> None:
        """Take a node away as a power cut would: its daemon and every process that the daemon started."""
        daemon = self.daemons.pop(name)
        steps = subprocess.run(["pgrep", "-f", rf"slurmstepd.*{name}|{self.folder}/spool/{name}"], capture_output=True)
        daemon.kill()
        for pid in steps.stdout.split():
            subprocess.run(["pkill", "-KILL", "-P", pid.decode()])
            subprocess.run(["kill", "-KILL", pid.decode()], stderr=subprocess.DEVNULL)

    def __enter__(self) -> SlurmCluster:
        self._write_files()
        munge = self.folder / "munge"
        self._start(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        deadline = time.monotonic() + 10
        while not (munge / "socket").exists():
            assert time.monotonic() < deadline, "munged did not start"
            time.sleep(0.1)
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for name in self.names:
            self.start_node(name)
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "nodes to be idle", 30)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--me"], env=self.environment, capture_output=True, timeout=20)
        deadline = time.monotonic() + 20  # the daemons must outlive the jobs, or nobody ends their processes
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.3)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=5)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands against this cluster and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING, PENDING, COMPLETED, FAILED."""
        shown = self.run("scontrol", "show", "job", job, "-o", check=False)
        return shown.split("JobState=")[1].split()[0] if "JobState=" in shown else "UNKNOWN"

    def wait_for(self, condition, what: str, seconds: float) -> None:
        """Wait until ``condition()`` is true; fail with ``what`` after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
            time.sleep(0.3)
