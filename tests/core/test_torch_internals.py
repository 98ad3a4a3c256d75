"""torch still has the private names that the library uses, and each predicate tells its case from the others."""

import re
import warnings
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from nfzoo import torch_internals as internals

ROOT = Path(__file__).resolve().parents[2]

# Of the predicates and functions of the module, in words that a message of a failed test shows.
NAMES = (
    "_C._functorch.maybe_current_level",
    "_C._len_torch_dispatch_stack",
    "_C._is_tracing",
    "_C._nn.mkldnn_reorder_conv2d_weight",
    "autograd.forward_ad._current_level",
    "nn.parallel.DistributedDataParallel._get_active_ddp_module",
    "_dynamo.config.recompile_limit",
    "_dynamo.config.accumulated_recompile_limit",
    "_dynamo.config.optimize_ddp",
    "_inductor.config.freezing",
    "fx.experimental._config.backed_size_oblivious",
    "ops.mkldnn._convolution_pointwise",
    "ops.mkldnn._is_mkldnn_bf16_supported",
    "_foreach_add",
    "_foreach_add_",
    "_foreach_copy_",
    "_foreach_lerp_",
    "_foreach_mul",
    "_foreach_mul_",
    "_foreach_norm",
    "_foreach_sub",
    "_fused_sgd_",
    "UntypedStorage._cdata",
)

# `torch._inductor`'s packages and `torch._dynamo.mark_static` are in torch's documentation.
PRIVATE = re.compile(
    r"\btorch\._(?!_version__|inductor|dynamo\.mark_static)|_functorch\.|forward_ad\._|torch\.fx\.experimental\._|_get_active_ddp|ops\.mkldnn\._|torch\.backends\._"
)


def test_torch_has_every_private_name() -> None:
    import torch._dynamo
    import torch._inductor.config
    import torch.fx.experimental._config

    missing = []
    for name in NAMES:
        owner = torch
        for part in name.split("."):
            if not hasattr(owner, part):
                missing.append(f"torch.{name}")
                break
            owner = getattr(owner, part)
    assert not missing, f"torch {torch.__version__} has no {missing}: change nfzoo/torch_internals.py"


def test_private_names_stand_in_one_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for folder in ("nfzoo", "hub", "conversion")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "torch_internals.py"
        for match in PRIVATE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def state() -> tuple[bool, ...]:
    return internals.in_functorch(), internals.in_forward_ad(), internals.in_dispatch_mode(), internals.in_jit_trace()


def test_each_predicate_knows_its_case() -> None:
    seen: list[tuple[bool, ...]] = [state()]

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(state())
        return x.square().sum()

    x = torch.ones(3)
    torch.func.grad(f)(x)
    with forward_ad.dual_level():
        f(x)
    with FlopCounterMode(display=False):
        f(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.trace` is deprecated", category=DeprecationWarning)
        torch.jit.trace(f, (x,), check_trace=False)
    nothing, functorch, forward, mode, trace = seen
    assert nothing == (False, False, False, False)
    assert functorch == (True, False, False, False)
    assert forward == (False, True, False, False)
    assert mode == (False, False, True, False)
    assert trace == (False, False, False, True)
    assert not internals.under_ddp()


def test_functionalization_is_seen_at_every_level() -> None:
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.in_functionalization())
        return x.square().sum()

    x = torch.ones(3)
    f(x)
    torch.func.grad(f)(x)
    torch.func.functionalize(f)(x)
    torch.func.functionalize(torch.func.grad(f))(x)
    torch.func.grad(torch.func.functionalize(f))(x)
    assert seen == [False, False, True, True, True]


def test_limits_of_dynamo_only_rise() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit
    internals.allow_recompilations(1)
    assert config.recompile_limit == before
