"""Several hosts on this machine: network namespaces with an address and a host name each, joined by a switch.

The switch lies in a namespace of its own, so that nothing of the machine's own network is touched. Needs root,
iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType


def missing_for_hosts() -> list[str]:
    """Return the programs and rights for making the hosts that this machine lacks."""
    missing = [program for program in ("ip", "bridge", "tc", "unshare") if shutil.which(program) is None]
    if os.geteuid() != 0:
        missing.append("root")
    if not missing:
        name = f"ft-probe-{os.getpid()}"
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if made.returncode == 0:
            bridge = ["ip", "-n", name, "link", "add", "switch", "type", "bridge"]
            made = subprocess.run(bridge, capture_output=True, text=True)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        if made.returncode:
            missing.append(f"the right to make network namespaces and bridges ({made.stderr.strip()})")
    return missing


class Hosts:
    """Use as a context manager; leaving it ends what was started and removes the namespaces."""

    def __init__(self, count: int = 2) -> None:
        """Choose names; nothing is made yet."""
        self.switch = f"ft{os.getpid()}-switch"
        self.spaces = [f"ft{os.getpid()}-{host}" for host in range(count)]
        self.addresses = [f"10.77.0.{host + 1}" for host in range(count)]
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        _run("ip", "netns", "add", self.switch)
        _run("ip", "-n", self.switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "switch", "up")
        for host, space in enumerate(self.spaces):
            _run("ip", "netns", "add", space)
            ends = ("link", "add", "net0", "type", "veth", "peer", "name", f"port{host}", "netns", self.switch)
            _run("ip", "-n", space, *ends)
            _run("ip", "-n", self.switch, "link", "set", f"port{host}", "master", "switch", "up")
            _run("ip", "-n", space, "address", "add", f"{self.addresses[host]}/24", "dev", "net0")
            for device in ("lo", "net0"):
                _run("ip", "-n", space, "link", "set", device, "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for space in self.spaces:
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-KILL", pid], capture_output=True)
        for process in self.started:
            process.wait(timeout=20)
        for space in (*self.spaces, self.switch):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def start(self, host: int, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, which calls itself host-0, host-1 …; its output goes to ``log``."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"host-{host}", *command]
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM_")}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "net0"} | variables
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.spaces[host], *named], stdout=file, stderr=file, env=env
            )
        self.started.append(process)
        return process

    def cut(self, host: int) -> None:
        """Pull a host's plug at the switch: its packets vanish, and nobody is told."""
        _run("ip", "-n", self.switch, "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        """Plug a host in again."""
        _run("ip", "-n", self.switch, "link", "set", f"port{host}", "master", "switch")
        time.sleep(0.5)

    def part(self, *hosts: int) -> None:
        """Keep these hosts from each other; all others still reach them."""
        for host in hosts:
            _run("bridge", "-n", self.switch, "link", "set", "dev", f"port{host}", "isolated", "on")

    def slow(self, host: int, megabit_per_s: int) -> None:
        """Limit what a host receives."""
        limit = ("rate", f"{megabit_per_s}mbit", "burst", "64kbit", "latency", "200ms")
        _run("tc", "-n", self.switch, "qdisc", "add", "dev", f"port{host}", "root", "tbf", *limit)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
