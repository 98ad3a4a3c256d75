"""Compare Haiku and nfzoo on a parameter file: `python -m nfzoo.conversion.verify F1_haiku.npz`.

Prints the relative error of the network's stream after every stage. The Haiku networks are stated here anew, from the
papers and the names of the parameters, and share no arithmetic with nfzoo's. jax and dm-haiku are needed for this
module alone; `tests/reference/check_haiku.py` holds its networks to what DeepMind's own code computes.

Source: arXiv 2101.08692 and 2102.06171, and the reference rules of the code released with them.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nfzoo.config import ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig
from nfzoo.conversion.convert import read
from nfzoo.conversion.haiku import Tree, to_haiku
from nfzoo.errors import ConversionError
from nfzoo.model import plan, run_block
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped
from nfzoo.types import Params

Stages = dict[str, NDArray]
"""`stem`, `stage 1` … `stage 4` (NHWC), `pool`, `logits` -> float32."""

TOLERANCE = 1e-5  # relative error that two float32 frameworks may have


class Comparison(NamedTuple):
    """The distance of nfzoo from Haiku at one stage: `|nfzoo - haiku| / |haiku|`, in float64."""

    stage: str
    error: float


def compare(cfg: ModelConfig, params: Params, x: NDArray) -> list[Comparison]:
    """Compare Haiku with nfzoo, on images `x` (N, H, W, C).

    Haiku gets `to_haiku` of the parameters, which is the tree that they were read from, bit for bit.
    """
    theirs, ours = haiku_stages(cfg, to_haiku(cfg, params), x), nfzoo_stages(cfg, params, x)
    return [Comparison(name, _relative(ours[name], theirs[name])) for name in ours]


def nfzoo_stages(cfg: ModelConfig, params: Params, x: NDArray) -> Stages:
    """Return the stream of nfzoo's network."""
    stream = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    out: Stages = {}
    with torch.no_grad():
        for block in plan(cfg):
            stream = run_block(block, params, stream)
            part, _, rest = block.name.partition(".")
            name = {"head": "logits"}.get(part, part)
            if part == "stages":
                name = f"stage {int(rest.partition('.')[0]) + 1}"
            array = stream.numpy()
            out[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    out.pop("final_conv", None)
    return out


def haiku_stages(cfg: ModelConfig, tree: Tree, x: NDArray) -> Stages:
    """Return the stream of the same network in Haiku."""
    hk, jax, jnp = _frameworks()
    net = hk.without_apply_rng(hk.transform(lambda images: _network(cfg, hk, jax, jnp)(images)))
    stages = jax.jit(net.apply)(jax.tree_util.tree_map(jnp.asarray, tree), jnp.asarray(x))
    return {name: np.asarray(value) for name, value in stages.items()}


def _network(cfg: ModelConfig, hk: Any, jax: Any, jnp: Any) -> Any:
    """Build the network as a Haiku module, whose parameters have DeepMind's names."""
    lax = jax.lax
    gamma, function = {
        "gelu_tanh": (1.7015043497085571, lambda x: jax.nn.gelu(x, approximate=True)),
        "relu": (1.7139588594436646, jax.nn.relu),
        "silu": (1.7881293296813965, jax.nn.silu),
    }[cfg.activation]

    def act(x: Any) -> Any:
        return function(x) * gamma

    class Conv(hk.Module):
        """SAME convolution whose kernel has mean 0 and variance gain² / fan_in per output channel."""

        def __init__(self, width: int, kernel: int, stride: int = 1, groups: int = 1, name: str | None = None) -> None:
            super().__init__(name)
            self.width, self.kernel, self.stride, self.groups = width, kernel, stride, groups

        def __call__(self, x: Any) -> Any:
            shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.width)
            w = hk.get_parameter("w", shape, init=jnp.zeros)
            gain = hk.get_parameter("gain", (self.width,), init=jnp.ones)
            bias = hk.get_parameter("bias", (self.width,), init=jnp.zeros)
            fan_in = np.prod(shape[:-1])
            mean, var = w.mean((0, 1, 2)), w.var((0, 1, 2))
            scale = lax.rsqrt(jnp.maximum(var * fan_in, 1e-4)) * gain
            return bias + lax.conv_general_dilated(
                x,
                w * scale - mean * scale,
                (self.stride, self.stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )

    class SqueezeExcite(hk.Module):
        def __init__(self, width: int, hidden: int, name: str | None = None) -> None:
            super().__init__(name)
            self.down, self.up = hk.Linear(hidden), hk.Linear(width)

        def __call__(self, x: Any) -> Any:
            gate = self.up(jax.nn.relu(self.down(x.mean((1, 2)))))
            return 2 * jax.nn.sigmoid(gate)[:, None, None] * x

    def pooled(x: Any) -> Any:
        """Apply a 2x2 average pool of stride 2 that does not count padding."""

        def total(y: Any) -> Any:
            return lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")

        return total(x) / total(jnp.ones_like(x))

    class Block(hk.Module):
        """One residual block of any family; `at` is its place in the whole network."""

        def __init__(self, inputs: int, outputs: int, stride: int, beta: float, at: int, name: str) -> None:
            super().__init__(name)
            self.beta, self.family = beta, cfg.family
            self.transition = stride > 1 or inputs != outputs
            self.pool = stride > 1 and self.family != "nf_resnet"
            middle, groups, attended, ratio = _middle(cfg, inputs, outputs, at)
            self.conv0 = Conv(middle, 1, name="conv0")
            self.conv1 = Conv(middle, 3, stride, groups, name="conv1")
            if self.family == "nfnet":
                self.conv1b = Conv(middle, 3, 1, groups, name="conv1b")
            self.conv2 = Conv(outputs, 1, name="conv2")
            if self.transition:
                self.shortcut = Conv(outputs, 1, 1 if self.pool else stride, name="conv_shortcut")
            self.attention = SqueezeExcite(attended, int(attended * ratio)) if ratio else lambda x: x

        def __call__(self, x: Any) -> Any:
            out = act(x) * self.beta
            if self.transition:
                x = self.shortcut(pooled(out) if self.pool else out)
            out = self.conv1(act(self.conv0(out)))
            if self.family == "nfnet":
                out = self.conv1b(act(out))
            if self.family == "nf_regnet":
                out = self.conv2(act(self.attention(out)))
            else:
                out = self.attention(self.conv2(act(out)))
            return out * hk.get_parameter("skip_gain", (), init=jnp.zeros) * cfg.alpha + x

    class Network(hk.Module):
        def __init__(self) -> None:
            root, block_name = {
                "nfnet": ("NFNet", "nf_block"),
                "nf_resnet": ("NF_ResNet", "nf_res_block"),
                "nf_regnet": ("NF_RegNet", "nf_block"),
            }[cfg.family]
            super().__init__(root)
            widths, features = _widths(cfg)
            if isinstance(cfg, NFNetConfig):
                sizes = zip(cfg.stem, (2, 1, 1, 2), strict=True)
                self.stem = [Conv(width, 3, s, name=f"stem_conv{i}") for i, (width, s) in enumerate(sizes)]
                width = cfg.stem_width
            elif isinstance(cfg, NFResNetConfig):
                self.stem, width = [Conv(cfg.stem_width, 7, 2, name="initial_conv")], cfg.stem_width
            else:
                self.stem, width = [Conv(widths[0], 3, 2, name="initial_conv")], widths[0]
            self.stages, at, variance = [], 0, 1.0
            for i, (outputs, depth) in enumerate(zip(widths, cfg.depths, strict=True)):
                blocks = []
                for j in range(depth):
                    stride = 2 if j == 0 and (i > 0 or cfg.family == "nf_regnet") else 1
                    name = block_name + (f"_{at}" if at else "")
                    blocks.append(Block(width, outputs, stride, variance**-0.5, at, name))
                    variance = (1.0 if j == 0 else variance) + cfg.alpha**2
                    width, at = outputs, at + 1
                self.stages.append(blocks)
            self.final = Conv(features, 1, name="final_conv") if features else None
            self.linear = hk.Linear(cfg.num_classes, name="linear")

        def __call__(self, x: Any) -> dict[str, Any]:
            out = {}
            for i, conv in enumerate(self.stem):
                x = conv(act(x) if i else x)
            if cfg.family == "nf_resnet":
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
            out["stem"] = x
            for i, blocks in enumerate(self.stages):
                for block in blocks:
                    x = block(x)
                out[f"stage {i + 1}"] = x
            x = self.final(x) if self.final is not None else x
            out["pool"] = act(x).mean((1, 2))
            out["logits"] = self.linear(out["pool"])
            return out

    return Network()


def _widths(cfg: ModelConfig) -> tuple[list[int], int]:
    """Return the output channels of the stages and, if there is one, of the final convolution."""
    if isinstance(cfg, NFRegNetConfig):
        widths = [int(w * cfg.width_factor) for w in cfg.widths]
        return widths, 1280 * widths[-1] // 440
    return list(cfg.widths), int(cfg.widths[-1] * cfg.head_ratio) if isinstance(cfg, NFNetConfig) else 0


def _middle(cfg: ModelConfig, inputs: int, outputs: int, at: int) -> tuple[int, int, int, float]:
    """Return width and groups of a block's 3x3 convolutions, channels under attention, and its ratio (0: none)."""
    if isinstance(cfg, NFNetConfig):
        groups = int(outputs * cfg.bottleneck) // cfg.group_width
        return groups * cfg.group_width, groups, outputs, cfg.se_ratio if cfg.attention == "se" else 0.0
    if isinstance(cfg, NFRegNetConfig):
        groups = int(inputs * (cfg.bottleneck if at else 1)) // cfg.group_width
        return groups * cfg.group_width, groups, groups * cfg.group_width, cfg.se_ratio
    assert isinstance(cfg, NFResNetConfig)
    return int(outputs * cfg.bottleneck), 1, outputs, 0.25 if cfg.attention == "se" else 0.0


def _frameworks() -> tuple[Any, Any, Any]:
    try:
        import haiku
        import jax  # pyright: ignore[reportMissingImports]
        import jax.numpy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConversionError(
            f"the comparison needs jax and dm-haiku, and {error.name} is not installed: pip install jax dm-haiku"
        ) from error
    return haiku, jax, jax.numpy


def _relative(a: NDArray, b: NDArray) -> float:
    if a.shape != b.shape:
        raise ConversionError(f"nfzoo's stream has shape {a.shape}, Haiku's {b.shape}")
    difference = a.astype(np.float64) - b.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(b.astype(np.float64)))


def main(argv: list[str] | None = None) -> int:
    """Compare a file in both frameworks: 0 if all errors are below `TOLERANCE`, 1 if not, 2 for bad input."""
    parser = program.Parser(
        prog="python -m nfzoo.conversion.verify",
        description="Run a Haiku parameter file in Haiku and in nfzoo, and print their relative difference per stage.",
    )
    parser.add_argument("file", help="DeepMind's pickle, or another file that `nfzoo convert` reads")
    parser.add_argument("--model", metavar="NAME", help="the zoo's name, if names and shapes do not tell")
    program.add_source_options(parser)
    parser.add_argument(
        "--size", type=program.positive_int, default=64, metavar="N", help="side of the input image (default: 64)"
    )
    return program.run("verify", lambda: _verify(parser.parse_args(argv)))


def _verify(options: argparse.Namespace) -> int:
    _frameworks()
    description, params, _ = read(options.file, model=options.model, **program.source_options(options))
    cfg = description.config
    x = np.random.default_rng(0).standard_normal((2, options.size, options.size, cfg.in_channels), np.float32)
    rows = compare(cfg, params, x)
    name = escaped(str(description.name))
    print(f"{name}, {cfg.num_classes} classes, {options.size} x {options.size} pixels, against Haiku")
    for row in rows:
        print(f"{row.stage:<8}  {row.error:.1e}")
    return 0 if all(row.error < TOLERANCE for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
