"""Compile the kernels of `nfzoo.optim.triton_update` for a GPU that need not be there; print the outcome as JSON.

python tests/gpu/compile_for_gpu.py 90
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from nfzoo.optim import triton_update as fused
from nfzoo.optim.triton_update import LONGEST, TILE

KERNEL: Any = fused._update_tiles

TYPES = {
    "tiles": "*i32",
    "table": "*i64",
    "counts": "*i32",
    "lr_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "gate_ptr": "*u8",
}


def compiled(capability: int, **constants: bool | int) -> dict[str, object]:
    names = KERNEL.arg_names
    types = {name: "constexpr" if name in constants else TYPES.get(name, "fp32") for name in names}
    source = ASTSource(KERNEL, types, {(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    tools = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {
        **{name.lower(): value for name, value in constants.items()},
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4", made.asm["ptx"])),
    }


if __name__ == "__main__":
    several = [(False, TILE // block, block) for block in (32, 1024, TILE)]
    shapes = {True: [*several, (False, 1, LONGEST), (True, 1, LONGEST)], False: [*several, (True, 1, TILE)]}
    kernels = [
        compiled(
            int(sys.argv[1]),
            CLIPPED=True,
            NESTEROV=True,
            AVERAGED=True,
            GATED=True,
            ALIGNED=aligned,
            LONG=long,
            ROWS=rows,
            BLOCK=block,
        )
        for aligned, forms in shapes.items()
        for long, rows, block in forms
    ]
    print(json.dumps(kernels))
