"""Work split over cores: every part is done once, errors arrive, settings stay."""

import multiprocessing
import os
import threading

import pytest
import torch

from metro.ops.threads import for_each


@pytest.fixture(params=[1, 3])
def num_threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def test_every_part_is_done_once_without_gradients(num_threads):
    done, workers = [], set()

    def work(part):
        assert not torch.is_grad_enabled()
        workers.add(threading.current_thread().name)
        done.append(part)

    for_each(work, range(20))
    assert sorted(done) == list(range(20)) and torch.is_grad_enabled()
    assert (threading.current_thread().name in workers) == (num_threads == 1)


def test_an_error_of_a_part_arrives(num_threads):
    def work(part):
        if part == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        for_each(work, range(5))


def sum_in_parts(queue) -> None:
    torch.get_num_threads = lambda: 2
    found = torch.zeros(4)
    for_each(lambda part: found[part].fill_(part), range(4))
    queue.put(float(found.sum()))


def test_a_forked_process_has_workers_of_its_own(monkeypatch):
    """Without, it waits for ever for threads that only its parent has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for_each(lambda part: None, range(4))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=sum_in_parts, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60) == 6.0
    finally:
        process.kill()
        process.join()
    assert process.pid != os.getpid()
