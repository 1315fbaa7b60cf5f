"""Finds hosts of the job that no longer answer when a step hangs, so that a dead link or host is named."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from fusiontree.utils.environment import meeting_point

MOST_HOSTS = 256
"""Jobs with more hosts are not probed, because every host would probe every other host."""
_DISCARD_PORT = 9


def host_address() -> str:
    """Return ``NAME ADDRESS`` of this host: the address of its route to the job's meeting point."""
    name = socket.gethostname()
    point = meeting_point()
    if point is None:
        return f"{name} 127.0.0.1"
    try:
        family, kind, _, _, address = socket.getaddrinfo(*point, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:  # IPv4 or IPv6, as the meeting point's address is
            probe.connect(address)  # sends nothing; chooses the route
            return f"{name} {probe.getsockname()[0]}"
    except OSError:
        return f"{name} 127.0.0.1"


def answers(address: str, timeout_s: float = 2.0) -> bool:
    """Return whether a host answers; a running host refuses a connection to a port without a listener."""
    try:
        with socket.create_connection((address, _DISCARD_PORT), timeout=timeout_s):
            return True
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


class Peers:
    """The other hosts of the job that answered at the start; hosts behind a firewall are not probed again."""

    def __init__(self, places: Iterable[str]) -> None:
        """Probe every host once.

        Args:
            places: ``host_address()`` of every rank.
        """
        hosts = dict.fromkeys(places)
        hosts.pop(host_address(), None)
        self.hosts = self._probed(list(hosts), wanted=True) if len(hosts) <= MOST_HOSTS else []

    def silent(self) -> list[str]:
        """Return the hosts that answered at the start and do not answer now, each as ``NAME ADDRESS``."""
        return self._probed(self.hosts, wanted=False)

    @staticmethod
    def _probed(hosts: list[str], wanted: bool) -> list[str]:
        if not hosts:
            return []
        with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
            found = pool.map(lambda host: answers(host.split()[1]), hosts)
        return [host for host, answered in zip(hosts, found, strict=True) if answered is wanted]
