"""The graph that XNNPACK gets computes what the model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from nfzoo.export.edge import _suit_xnnpack
from tests.support.helpers import relative


class Parts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x, approximate="tanh")
        even = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        odd = F.avg_pool2d(even[..., 1:, :], 2, 2, ceil_mode=True, count_include_pad=False)
        return torch.cat(
            [even.mean((2, 3)), odd.mean((2, 3)), odd.mean((2, 3), keepdim=True)[..., 0, 0], F.gelu(odd)[..., 0, 0]], 1
        )


def test_what_is_rewritten_for_xnnpack_is_the_same_function() -> None:
    x = 3 * torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    graph: Any = make_fx(Parts())(x)
    before = Parts()(x)
    _suit_xnnpack(graph, x)
    assert relative(graph(x), before) < 1e-6
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    found = [(n.target, n.args[1:], dict(n.kwargs)) for n in nodes]
    aten = torch.ops.aten
    # The window of an odd side goes over the edge, and the exact GELU is none of ours.
    pools = [args for target, args, _ in found if target == aten.avg_pool2d.default]
    assert sorted(map(len, pools)) == [2, 5]
    assert [kwargs for target, _, kwargs in found if target == aten.gelu.default] == [{}]
    assert all(args[1] for target, args, _ in found if target == aten.mean.dim)
