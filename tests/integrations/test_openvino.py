"""`NFNet.optimize` by OpenVINO itself."""

import torch

from nfzoo.nn import NFNet
from tests.support.helpers import SMALL, images, random_params, relative

DISTANCE = {"float32": 1e-5, "bf16": 5e-2}


def test_it_computes_what_the_model_computes() -> None:
    for name in ("nfnet", "nf-resnet-timm-eca", "nf-regnet"):
        made = NFNet(SMALL[name])
        made.load_state_dict(random_params(made.config))
        made.eval()
        x = images(made.config, 2, 40, 40)
        for dtype, distance in DISTANCE.items():
            fast = made.for_inference().optimize(batch=2, size=40, dtype=dtype, backend="openvino")
            assert fast.execution is not None
            assert fast.execution.form == "openvino"
            with torch.inference_mode():
                own = x.to(fast.execution.dtype)
                for ours, theirs in (
                    (fast(own), made(x)),
                    (fast.embed(own), made.embed(x)),
                    (fast(own[:1]), made(x[:1])),
                ):
                    assert ours.dtype == own.dtype
                    assert relative(ours.float(), theirs) < distance, (name, dtype)
