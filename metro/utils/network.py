"""Whether a server can be reached, found out within seconds, and what follows without a network.

The Hugging Face libraries try again for half a minute and longer, for every file. So they are told
to use their caches alone once their hub does not take a connection.
"""

import os
import socket
import sys
import threading
import urllib.parse
import urllib.request
from functools import lru_cache

SECONDS = 5.0
"""Longest wait for a name to be resolved and a connection to be taken."""


@lru_cache(maxsize=8)
def is_reachable(url: str) -> bool:
    """Tell whether the server of an address, or the proxy for it, takes a connection."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=SECONDS).close()
        except (OSError, ValueError):
            return
        connected.set()

    # In a thread, as no time limit holds for the name server.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(SECONDS)
    return connected.is_set()


def hub_address() -> str:
    """Address of the Hugging Face hub, or of the mirror that ``HF_ENDPOINT`` names."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def use_cache_without_network() -> None:
    """Make the Hugging Face libraries use their caches alone if the hub cannot be reached."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not is_reachable(hub_address()):
        use_cache_alone()


def use_cache_alone() -> None:
    """Set what ``HF_HUB_OFFLINE=1`` sets, in this process."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    for module, name in (
        ("datasets.config", "HF_HUB_OFFLINE"),
        ("transformers.utils.hub", "_is_offline_mode"),  # before version 5
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)
