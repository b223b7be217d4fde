"""Check addresses before the service listens on them, so that an error is one line at the start."""

import socket

ANY_PORT = 0


def is_port_free(host: str, port: int) -> bool:
    """Whether this machine can listen on the address; `::` needs IPv6, which may be turned off.

    With ANY_PORT: whether it can listen on any port of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True
