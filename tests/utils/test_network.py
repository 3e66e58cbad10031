"""Servers that answer, refuse a connection, or never answer are told apart within seconds."""

import http.server
import socket
import threading
import time

import huggingface_hub.constants
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


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):  # noqa: N802, the name that http.server looks for
        self.send_error(404)

    def log_message(self, *args):
        pass


def test_a_server_or_its_proxy_is_reached_or_not(monkeypatch):
    """Oracle: a server that answers (404), and its port when it is closed."""
    monkeypatch.setattr(network, "SECONDS", 5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        assert is_reachable(f"http://127.0.0.1:{port}/path")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert is_reachable("http://nowhere.invalid")
        monkeypatch.delenv("http_proxy")
        server.shutdown()
    is_reachable.cache_clear()
    assert not is_reachable(f"http://127.0.0.1:{port}/path")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_never_answers_is_not_waited_for(scheme):
    """Oracle: a socket that takes connections, and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        assert not is_reachable(f"{scheme}://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 3


def test_a_name_that_is_never_resolved_is_not_waited_for(monkeypatch):
    def wait(*args, **kwargs):
        time.sleep(5)
        raise OSError("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", wait)
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
