"""Whether a server can be reached, found out within seconds, and what follows without a network.

The Hugging Face libraries try again for half a minute and longer, for every file. So they are told
to use their caches alone once their hub does not answer.
"""

import http.client
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from functools import lru_cache

SECONDS = 5.0
"""Longest wait for an answer, the resolution of the name included."""


@lru_cache(maxsize=8)
def is_reachable(url: str) -> bool:
    """Tell whether the server of an address answers, by its proxy where there is one.

    Any answer will do, also one that says no.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            asked = urllib.request.Request(url, method="HEAD")
            urllib.request.build_opener().open(asked, timeout=SECONDS).close()
        except (urllib.error.HTTPError, http.client.HTTPException):
            pass
        except (OSError, ValueError) as error:
            # Of certificates others may know more than Python.
            if not isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                return
        answered.set()

    # In a thread, as no time limit holds for the name server.
    attempt = threading.Thread(target=ask, daemon=True)
    attempt.start()
    attempt.join(SECONDS)
    return answered.is_set()


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
    if "datasets.config" in sys.modules:
        vars(sys.modules["datasets.config"])["HF_HUB_OFFLINE"] = True
