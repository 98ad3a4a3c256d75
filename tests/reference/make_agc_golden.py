"""Write agc_golden.npz: what optax's and DeepMind's adaptive gradient clipping makes of reproducible gradients.

Run by hand, where jax and optax import (jax 0.10.2 and optax 0.2.8 made the stored file), from any directory, with the
path of `nfnets/agc_optax.py` of the code released with arXiv 2102.06171:

    python make_agc_golden.py agc_optax.py

optax is the implementation that is stored. DeepMind's must agree with it to the last bit or two; it takes no kernels of
five dimensions, and reads three dimensions as several linears, so these two cases are optax's alone. No test imports
this script.

agc_golden.npz, all arrays float32 in torch's layout (out, in, ...)
    "param:{case}", "grad:{case}": the inputs. Units differ in their scale, so that some are clipped.
    "clipped:{case}:{clip}:{eps}": the gradient after clipping.
"""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np
import optax  # pyright: ignore[reportMissingImports]
from refweights import unit_noise

HERE = Path(__file__).resolve().parent
CASES = {
    "kernel": (6, 4, 3, 3),
    "grouped": (8, 2, 3, 3),
    "depthwise": (6, 1, 3, 3),
    "pointwise": (5, 3, 1, 1),
    "pointwise of one channel": (7, 1, 1, 1),
    "kernel of one output": (1, 4, 3, 3),
    "kernel of one dimension": (5, 3, 3),
    "kernel of three dimensions": (5, 2, 2, 3, 3),
    "linear": (5, 7),
    "linear of fan-in 1": (6, 1),
    "linear of one output": (1, 7),
    "linear of one number": (1, 1),
    "channel attention": (1, 1, 3),
    "gain": (8,),
    "skip gain": (1,),
    "scalar": (),
}
LIMITS = ((0.01, 1e-3), (0.1, 1e-3), (0.01, 0.5))
TO_JAX = {3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0), 2: (1, 0)}  # to (..., in, out)


def inputs(case: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return a parameter and its gradient; the first of several units is zero, as some are at initialisation."""
    out = shape[0] if shape else 1
    rows = (np.arange(out, dtype=np.float32)).reshape([-1] + [1] * (len(shape) - 1)) if shape else np.float32(0)
    param = unit_noise(shape, f"param:{case}") * np.float32(0.3)
    if len(shape) > 1 and out > 1:
        param[0] = 0
    return param, unit_noise(shape, f"grad:{case}") * np.float32(0.02) * np.float32(0.25) ** (rows % 4)


def main(source: str) -> None:
    spec = importlib.util.spec_from_file_location("agc_optax", source)
    assert spec is not None
    assert spec.loader is not None
    deepmind = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(deepmind)
    arrays: dict[str, np.ndarray] = {}
    for case, shape in CASES.items():
        param, grad = inputs(case, shape)
        arrays[f"param:{case}"], arrays[f"grad:{case}"] = param, grad
        order = TO_JAX.get(len(shape), tuple(range(len(shape))))
        back = tuple(np.argsort(order))
        p, g = (jnp.asarray(x.transpose(order)) for x in (param, grad))
        for clip, eps in LIMITS:
            axis = (0, 1) if case == "kernel of one dimension" else None
            transform = optax.adaptive_grad_clip(clip, eps, axis=axis)
            clipped = np.asarray(transform.update(g, transform.init(p), p)[0])
            if axis is None and len(shape) < 5:
                limit = clip * jnp.maximum(deepmind.unitwise_norm(p), eps)
                np.testing.assert_allclose(deepmind.my_clip(deepmind.unitwise_norm(g), limit, g), clipped, rtol=3e-7)
            arrays[f"clipped:{case}:{clip}:{eps}"] = clipped.transpose(back).copy()
    np.savez_compressed(HERE / "agc_golden.npz", **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(sys.argv[1])
