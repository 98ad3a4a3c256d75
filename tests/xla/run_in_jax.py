"""Run an exported StableHLO program with jax, which knows nothing of torch: `run_in_jax.py PROGRAM INPUTS OUTPUTS`.

INPUTS and OUTPUTS are `.npz` files of arrays by name.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import numpy as np


def main(program: Path, inputs: Path, outputs: Path) -> int:
    jax.config.update("jax_enable_x64", True)  # labels and the step counter are int64
    names = json.loads(program.with_suffix(".json").read_text(encoding="utf-8"))
    from jaxlib import _jax, xla_client  # pyright: ignore[reportMissingImports]

    device = jax.devices("cpu")[0]
    given = np.load(inputs)
    arrays = [jax.device_put(given[want["name"]], device) for want in names["inputs"]]
    executable = device.client.compile_and_load(
        program.read_bytes(), _jax.DeviceList((device,)), xla_client.CompileOptions()
    )
    results = [np.asarray(result) for result in executable.execute(arrays)]
    for want, result in zip(names["outputs"], results, strict=True):
        assert list(result.shape) == want["shape"]
        assert str(result.dtype) == want["dtype"]
    named: dict[str, Any] = {want["name"]: result for want, result in zip(names["outputs"], results, strict=True)}
    np.savez(outputs, **named)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
