"""Servers that take a connection, refuse it, or never answer are told apart within seconds."""

import socket
import time

import huggingface_hub
import pytest

import metro
from metro.utils import network
from metro.utils.messages import UserError
from metro.utils.network import is_reachable


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(network, "SECONDS", 0.3)
    is_reachable.cache_clear()
    yield
    is_reachable.cache_clear()


def test_a_server_or_its_proxy_is_reached_or_not(monkeypatch):
    """Oracle: a socket that listens, and its port when it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert is_reachable(f"http://127.0.0.1:{port}/path")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert is_reachable("https://nowhere.invalid")
        monkeypatch.delenv("https_proxy")
    is_reachable.cache_clear()
    assert not is_reachable(f"http://127.0.0.1:{port}/path")


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    def wait(*args, **kwargs):
        time.sleep(5)
        raise OSError("timed out")

    monkeypatch.setattr(socket, "create_connection", wait)
    began = time.monotonic()
    assert not is_reachable("https://huggingface.co")
    assert time.monotonic() - began < 3


def test_a_model_of_the_hub_without_a_network_is_one_line_at_once(monkeypatch, tmp_path):
    """Oracle: no request is made, the message has address and remedy, and no chain of errors."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached: copy") as refused:
        metro.load("metro_t0_base")
    assert "\n" not in str(refused.value) and refused.value.__cause__ is None
    assert huggingface_hub.constants.HF_HUB_OFFLINE
