"""Deterministic reference weights: the same bits on every machine, from integer arithmetic alone."""

import zlib

import numpy as np


def unit_noise(shape, key):
    """Uniform noise of mean 0 and variance 1, float32, a pure function of (shape, key)."""
    n = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    out = np.empty(n, np.float32)
    seed = np.uint64(zlib.crc32(key.encode())) << np.uint64(32)
    step = 1 << 22
    with np.errstate(over="ignore"):
        for start in range(0, n, step):
            z = np.arange(start, min(n, start + step), dtype=np.uint64) + seed
            z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            u = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
            out[start : start + len(u)] = ((u - 0.5) * 12**0.5).astype(np.float32)
    return out.reshape(shape)


def weights(shapes):
    """{module: {name: shape}} (Haiku names and shapes) -> the same tree of float32 arrays."""
    tree = {}
    for module in sorted(shapes):
        tree[module] = {}
        for name, shape in sorted(shapes[module].items()):
            shape = tuple(shape)
            noise = unit_noise(shape, module + ":" + name)
            fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
            if name == "w":
                v = 0.02 / fan_in**0.5 + noise / fan_in**0.5
            elif name == "gain":
                v = 1.0 + 0.1 * noise
            elif name == "skip_gain":
                v = 0.5 + 0.2 * noise
            else:
                v = 0.1 * noise
            tree[module][name] = np.asarray(v, np.float32)
    return tree
