"""`print(model)` shows what is computed: every layer with its channels, kernel, stride, dilation and groups."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from nfzoo import NFNet, create
from nfzoo.model import plan
from nfzoo.runtime.block_module import BlockModule
from tests.support.helpers import SMALL, images, random_params

FIRST_BLOCKS = """\
NFNet(
  (stem): Module(
    (conv0): WSConv2d(3 -> 4, 3x3, stride=2)
    (conv1): WSConv2d(4 -> 8, 3x3)
    (conv2): WSConv2d(8 -> 16, 3x3)
    (conv3): WSConv2d(16 -> 32, 3x3, stride=2)
  )
  (stages): ModuleList(
    (0): ModuleList(
      (0): FBlock(
        alpha=0.2, beta=1
        (conv0): WSConv2d(32 -> 16, 1x1)
        (conv1): WSConv2d(16 -> 16, 3x3)
        (conv1b): WSConv2d(16 -> 16, 3x3)
        (conv2): WSConv2d(16 -> 32, 1x1)
        (se): SqueezeExcite(
          (fc0): Linear(32 -> 16)
          (fc1): Linear(16 -> 32)
        )
      )
    )
    (1): ModuleList(
      (0): FBlock(
        alpha=0.2, beta=0.9806
        (shortcut): WSConv2d(32 -> 64, 1x1)
        (conv0): WSConv2d(32 -> 32, 1x1)
        (conv1): WSConv2d(32 -> 32, 3x3, stride=2, groups=2)
        (conv1b): WSConv2d(32 -> 32, 3x3, groups=2)
        (conv2): WSConv2d(32 -> 64, 1x1)
        (se): SqueezeExcite(
          (fc0): Linear(64 -> 32)
          (fc1): Linear(32 -> 64)
        )
      )
    )
"""
END = """\
  (final_conv): WSConv2d(128 -> 256, 1x1)
  (pool): Pool()
  (head): Linear(256 -> 10)
)"""


def test_the_first_blocks_and_the_end() -> None:
    text = repr(create("nfnet-test"))
    assert text.startswith(FIRST_BLOCKS)
    assert text.endswith(END)


def test_inference_form_drop_rates_and_other_heads() -> None:
    net = create("nfnet-test", stochastic_depth=0.4, drop_rate=0.2)
    assert "alpha=0.2, beta=0.9806, drop=0.3\n" in repr(net.get_submodule("stages.3.0"))
    assert repr(net.head) == "Linear(256 -> 10, drop=0.2)"
    lean = net.for_inference()
    assert repr(lean.get_submodule("stem.conv0")) == "Conv2d(3 -> 4, 3x3, stride=2)"
    assert repr(lean.get_submodule("stages.1.0")).startswith("FoldedBlock(\n  (shortcut): Conv2d(32 -> 64, 1x1)\n")
    net.reset_classifier(0)
    assert repr(net.head) == "Identity(drop=0.2)"
    net.head = nn.Linear(256, 2)
    assert repr(net).endswith("(head): Linear(in_features=256, out_features=2, bias=True)\n)")


class Calls(TorchFunctionMode):
    """Record the shapes and geometry of the layers that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            _, weight, _, stride, _, dilation, groups = args
            out, inputs, *kernel = weight.shape
            self.seen.append((inputs * groups, out, *kernel, stride, dilation, groups))
        elif func in (F.linear, F.conv1d):
            self.seen.append((args[1].shape[1], args[1].shape[0], *args[1].shape[2:]))
        return func(*args, **(kwargs or {}))


def printed(block: BlockModule) -> list[tuple[Any, ...]]:
    found = []
    for kind, inputs, outputs, rest in re.findall(r"(Linear|Conv1d|Conv2d)\((\d+) -> (\d+)([^)]*)\)", repr(block)):
        kernel = [int(n) for n in re.findall(r"\d+", rest.split(",")[1])] if kind != "Linear" else []
        options = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", rest)}
        geometry = [options.get(name, 1) for name in ("stride", "dilation", "groups")] if kind == "Conv2d" else []
        found.append((int(inputs), int(outputs), *kernel, *geometry))
    return found


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("folded", [False, True], ids=["trained", "folded"])
@pytest.mark.parametrize("output_stride", [32, 8])
def test_layers_are_printed_as_they_are_computed(name: str, folded: bool, output_stride: int) -> None:
    net = NFNet(SMALL[name].replace(output_stride=output_stride)).eval()
    net.load_state_dict(random_params(net.config))
    net = net.for_inference() if folded else net
    x = images(net.config).requires_grad_()  # so that torch's own convolution computes
    for block in net.plan:
        module: Any = net.get_submodule(block.name)
        with Calls() as calls:
            x = module(x)
        assert sorted(calls.seen) == sorted(printed(module)), block.name


def test_layers_are_no_blocks() -> None:
    """Sharding and compilation recognise block modules by their attribute `block`."""
    net = create("nfnet-test")
    assert [m.block for m in net.modules() if hasattr(m, "block")] == list(plan(net.config))
