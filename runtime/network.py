"""Through which network interface this host reaches the job's first one, for libraries that would guess it wrongly."""

from __future__ import annotations

import os
import socket

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """Have gloo use the interface that leads to MASTER_ADDR, unless the user has named one.

    By itself it takes the address of the host's own name, which on Debian is a loopback one: hosts then wait for each
    other until a time-out.
    """
    name = interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if VARIABLE not in os.environ and name:
        os.environ[VARIABLE] = name


def interface_towards(host: str) -> str:
    """Name of the network interface to a host; empty if it is the loopback, or there is no route."""
    own = address_towards(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return "" if own.startswith("127.") or own == "::1" else name
    return ""


def address_towards(host: str) -> str:
    """This host's address as `host` sees it; empty if there is no route. Sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""
