"""Joining the other processes."""

import torch

from metro.processes import join_processes


def test_a_process_group_of_the_caller_stays(monkeypatch, tmp_path):
    """Oracle: torch, asked before and after; a group that was made here is destroyed."""
    for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    group = torch.distributed
    store = group.FileStore(str(tmp_path / "store"), 1)
    group.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        join_processes("cpu").close()
        assert group.is_initialized()
    finally:
        group.destroy_process_group()
    made = lambda backend: real("gloo", store=store, rank=0, world_size=1)  # noqa: E731
    real, store = group.init_process_group, group.FileStore(str(tmp_path / "other"), 1)
    monkeypatch.setattr(group, "init_process_group", made)
    processes = join_processes("cpu")
    assert group.is_initialized()
    processes.close()
    assert not group.is_initialized()
