"""Where the time goes. Oracle: multiplications and additions counted by hand."""

import torch
import torch.nn.functional as F
from torch.profiler import record_function

from benchmarks.time_by_part import by_part
from metro.ops.cached_attention import CachedAttention


def test_products_belong_to_the_part_that_called_them():
    x_TD, w_ED, b_E = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    q_BHTK, k_BHSK, v_BHSK = torch.randn(2, 6, 3, 8), *torch.randn(2, 2, 6, 7, 8)

    def run() -> None:
        F.linear(x_TD, w_ED)
        F.linear(x_TD, w_ED, b_E)
        F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK)
        with record_function("optimizer"):
            x_TD.add(1) @ x_TD.T
        F.layer_norm(x_TD, (4,))
        x_TD.exp()

    with torch.inference_mode():
        parts = by_part(run)
    flops = {part: flops for part, (_, flops) in parts.items()}
    assert flops == {
        "products": 2 * (2 * 3 * 4 * 5),
        "attention": 2 * (2 * 2 * 6 * 3 * 7 * 8),
        "optimizer": 2 * 3 * 4 * 3,
        "dropout, residual, LayerNorm": 0,
        "the rest": 0,
    }
    assert all(seconds > 0 for seconds, _ in parts.values())


def test_the_way_back_belongs_to_the_same_part(monkeypatch):
    """Two products forward, five backward, of which one is the scores' once more; one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q, k, v = torch.randn(3, 1, 2, 32, 8, requires_grad=True).unbind()

    def run() -> None:
        CachedAttention.apply(q, k, v, None, None, False, None, 0.0).sum().backward()

    assert by_part(run)["attention"][1] == 7 * 2 * (2 * 32 * 32 * 8)
