"""Check conversion/verify.py, our statement of DeepMind's networks in Haiku, against the logits of DeepMind's code.

Run by hand where jax, dm-haiku and nfzoo are installed: `python -m tests.reference.check_haiku`. No test imports it.
Exits with 1 if Haiku or nfzoo is off.
"""

import json
import sys
from pathlib import Path

import numpy as np

from nfzoo.conversion.haiku import from_haiku
from nfzoo.conversion.verify import compare, haiku_stages
from nfzoo.variants import VARIANTS
from tests.reference.refweights import unit_noise, weights

FOLDER = Path(__file__).resolve().parent
MOST = 1e-5
CASES = (
    ("nfnet-f0", "nfnet_F0", 64, 64),
    ("nfnet-f0", "nfnet_F0", 75, 53),
    ("nf-resnet-50", "nf_resnet_ResNet50", 64, 64),
    ("nf-regnet-b0", "nf_regnet_B0", 64, 64),
)


def main():
    worst = 0.0
    for name, file, height, width in CASES:
        tree = weights(json.loads((FOLDER / f"{file}_1000.shapes.json").read_text()))
        x = unit_noise((2, height, width, 3), f"input:{height}x{width}")
        cfg = VARIANTS[name].config
        stages = haiku_stages(cfg, tree, x)
        with np.load(FOLDER / f"{file}_{height}x{width}_1000.npz") as golden:
            errors = {
                f"haiku's {key} from DeepMind's": np.linalg.norm(stages[key] - golden[key])
                / np.linalg.norm(golden[key])
                for key in ("pool", "logits")
            }
        errors |= {f"nfzoo's {row.stage} from haiku's": row.error for row in compare(cfg, from_haiku(cfg, tree), x)}
        print(f"{name}, {height} x {width}")
        for what, error in errors.items():
            print(f"  {what:<32}  {error:.1e}")
        worst = max(worst, *errors.values())
    return 0 if worst < MOST else 1


if __name__ == "__main__":
    sys.exit(main())
