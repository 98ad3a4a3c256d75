"""Write haiku_dumps.tar.xz: small parameter files as today's jax, haiku, dill, ml_dtypes and numpy make them.

Run by hand beside them, from the repository: `python -m tests.reference.make_haiku_dumps`. No test imports it. The net
is a toy with every kind of array that the zoo's have; the values come from `refweights.py`. `read as` in
`contents.json` is the SHA-256 of what a reader has to find: see `digest`.
"""

# pyright: reportMissingImports=false, reportArgumentType=false

import collections
import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import dill
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from haiku._src.data_structures import to_immutable_dict

from tests.reference.refweights import unit_noise

ARCHIVE = Path(__file__).resolve().parent / "haiku_dumps.tar.xz"


def toy(x):
    """A net of Haiku's own with every kind of array the zoo's have: a kernel, a linear, vectors, a scalar."""

    class WSConv2D(hk.Module):
        def __call__(self, x):
            w = hk.get_parameter("w", (3, 3, 2, 4), init=jnp.ones)
            gain = hk.get_parameter("gain", (4,), init=jnp.ones)
            bias = hk.get_parameter("bias", (4,), init=jnp.zeros)
            return (
                jax.lax.conv_general_dilated(x, w * gain, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
                + bias
            )

    class NFNet(hk.Module):
        def __init__(self, name=None):
            super().__init__(name)
            self.conv = WSConv2D(name="stem_conv0")
            self.linear = hk.Linear(3, name="linear")

        def __call__(self, x):
            x = self.conv(x) * hk.get_parameter("skip_gain", (), init=jnp.zeros)
            return self.linear(x.mean((1, 2)))

    return NFNet(name="NFNet")(x)


def numbers(tree):
    """The tree with reference noise for its values, as numpy arrays."""
    return {
        m: {n: np.asarray(unit_noise(a.shape, f"{m}:{n}"), np.float32) for n, a in d.items()} for m, d in tree.items()
    }


def digest(tree):
    """SHA-256 over the arrays, sorted by their dotted names: `name:shape:`, then the values as `<f4`."""
    h = hashlib.sha256()
    for name, array in sorted(flattened(tree).items()):
        array = np.asarray(array).astype("<f4")
        h.update(f"{name}:{array.shape}:".encode() + array.tobytes("C"))
    return h.hexdigest()


def mapped(f, tree):
    return {m: {n: f(a) for n, a in d.items()} for m, d in tree.items()}


def flattened(tree):
    """As `flatten_haiku_tree` of the code released with arXiv 2102.06171 does it."""
    return {m.replace("/~/", ".").replace("/", ".") + "." + n: a for m, d in tree.items() for n, a in d.items()}


def main():
    made = hk.without_apply_rng(hk.transform(toy)).init(jax.random.PRNGKey(0), jnp.ones((1, 8, 8, 2)))
    tree = numbers(made)
    device = mapped(jnp.asarray, tree)
    half = mapped(lambda a: a.astype(ml_dtypes.bfloat16), tree)
    forms = {
        "numpy": tree,
        "jax": device,
        "flatmap": to_immutable_dict(tree),
        "jax-flatmap": to_immutable_dict(device),
        "ordered": collections.OrderedDict((m, collections.OrderedDict(d)) for m, d in tree.items()),
        "numpy-bfloat16": half,
        "jax-bfloat16": mapped(lambda a: jnp.asarray(a, jnp.bfloat16), tree),
        "fortran": mapped(np.asfortranarray, tree),
        "permuted": mapped(lambda a: a.transpose(3, 0, 2, 1).copy().transpose(1, 3, 2, 0) if a.ndim == 4 else a, tree),
        "scalars": mapped(lambda a: a if a.ndim else a[()], tree),
        "big-endian": mapped(lambda a: a.astype(">f4"), tree),
        "float16": mapped(lambda a: a.astype(np.float16), tree),
        "float64": mapped(lambda a: a.astype(np.float64), tree),
        "flattened": flattened(tree),
        "pairs": {(m, n): a for m, d in tree.items() for n, a in d.items()},
    }
    files, contents = {}, {}
    for form, value in forms.items():
        plain = value if form not in ("flattened", "pairs") else tree
        wanted = digest(plain)
        for library in (pickle, dill):
            for protocol in (2, 3, 4, 5):
                name = f"{form}.{library.__name__}{protocol}"
                files[name] = library.dumps(value, protocol=protocol)
                contents[name] = wanted
    for name, arrays, save in (
        ("slashes.npz", {f"{m}/{n}": a for m, d in tree.items() for n, a in d.items()}, np.savez),
        ("packed.npz", {f"{m}:{n}": a for m, d in tree.items() for n, a in d.items()}, np.savez_compressed),
        ("dotted.npz", flattened(tree), np.savez),
        ("jax.npz", flattened(device), np.savez),
        ("bfloat16.npz", flattened(half), np.savez_compressed),
        (
            "keystr.npz",
            {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_flatten_with_path(tree)[0]},
            np.savez_compressed,
        ),
    ):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        files[name] = buffer.getvalue()
        contents[name] = digest(half if name == "bfloat16.npz" else tree)
    versions = {m.__name__: m.__version__ for m in (jax, hk, dill, ml_dtypes, np)}
    files["contents.json"] = json.dumps({"versions": versions, "read as": contents}, indent=1).encode()
    with tarfile.open(ARCHIVE, "w:xz") as archive:  # solid, so that likeness between the files costs nothing
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main()
