"""Write timm_golden.npz, timm_golden.json and timm_output_strides.npz: what timm computes on reproducible weights.

Run by hand, in an environment where timm (1.0.31 made the stored files) imports, from any directory:

    python make_timm_golden.py

timm is the independent implementation to compare with; no test imports it. All weights and inputs come from integer
arithmetic alone (refweights.unit_noise), so a test makes the same bits again from nothing but names and shapes.

timm_golden.npz
    "{arch}:{H}x{W}" -> logits (2, 10), float32: the model with 10 classes, evaluation mode, on `image_batch(H, W)`.
timm_golden.json
    "timm", "torch": the versions that made the files.
    "architectures": {arch: {"parameters": {"1000": n, "10": n}, "state_sha256": ..., "rounding": {...}}}, where
        state_sha256 is `state_digest` of the state_dict shapes with 10 classes, and rounding (only where logits are
        stored) is, per "{H}x{W}", the largest |float32 logit - float64 logit| over the largest |float64 logit|.
    "state_shapes": {arch: {state_dict key: shape}} in state_dict order, 10 classes, for the architectures in LISTED.
timm_output_strides.npz
    "{arch}:{output stride}:{H}x{W}:logits" -> (2, 10), and ":map" -> the first CHANNELS channels of the last stage's
    output for the first image, (CHANNELS, H / output stride, W / output stride), rounded up; both float32.
"""

import gc
import hashlib
import json
from pathlib import Path

import numpy as np
import timm  # pyright: ignore[reportMissingImports]
import torch
from refweights import unit_noise

HERE = Path(__file__).resolve().parent
CLASSES = 10
SIZES = ((64, 64), (75, 53))
ARCHITECTURES = (
    *(f"dm_nfnet_f{i}" for i in range(7)),
    *(f"nfnet_f{i}" for i in range(8)),
    "nfnet_l0",
    *(f"eca_nfnet_l{i}" for i in range(4)),
    *(f"nf_regnet_b{i}" for i in range(6)),
    *(f"nf_{kind}resnet{depth}" for kind in ("", "se", "eca") for depth in (26, 50, 101)),
    "test_nfnet",
)
WITHOUT_LOGITS = {
    f"{prefix}_f{i}" for prefix in ("dm_nfnet", "nfnet") for i in range(2, 8)
}  # large, and like f0 and f1
STRIDED = ("nf_resnet26", "nf_regnet_b0", "test_nfnet")
CHANNELS = 4
LISTED = ("nf_resnet26", "nf_regnet_b0", "nfnet_l0", "eca_nfnet_l0", "dm_nfnet_f0")


def reference_value(name, shape):
    """The float32 array that a state_dict entry is set to, a pure function of its name and shape."""
    noise = unit_noise(shape, name)
    if name.endswith("skipinit_gain"):
        value = 0.5 + 0.2 * noise
    elif name.endswith("gain"):
        value = 1.0 + 0.1 * noise
    elif name.endswith("weight"):
        fan_in = int(np.prod(shape[1:]))
        value = 0.02 / fan_in**0.5 + noise / fan_in**0.5
    elif name.endswith("bias"):
        value = 0.1 * noise
    else:
        raise ValueError(f"no rule for {name}")
    return np.asarray(value, np.float32)


def image_batch(height, width):
    """The input: (2, 3, height, width) float32, made channels last and transposed."""
    noise = unit_noise((2, height, width, 3), f"input:{height}x{width}")
    return torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))


def shapes_only(arch, classes):
    """Ordered {state_dict key: shape} and the parameter count, without allocating the weights."""
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=classes)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, sum(parameter.numel() for parameter in model.parameters())


def state_digest(shapes):
    """SHA-256 of the sorted lines "key:d0,d1,..." joined by newlines (a scalar's line ends in the colon)."""
    lines = sorted(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def logits_and_rounding(arch):
    """Per size, the float32 logits and their relative distance from the same network in float64."""
    model = reference_model(arch)
    logits = {size: model(image_batch(*size)).numpy() for size in SIZES}
    model.double()
    rounding = {}
    for size in SIZES:
        exact = model(image_batch(*size).double()).numpy()
        rounding[size] = float(np.abs(logits[size] - exact).max() / np.abs(exact).max())
    return logits, rounding


def reference_model(arch, **options):
    """The network with the reference weights, in evaluation mode."""
    model = timm.create_model(arch, num_classes=CLASSES, **options).eval()
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(reference_value(name, tuple(tensor.shape))))
    return model


@torch.inference_mode()
def write_output_strides():
    """Write timm_output_strides.npz."""
    arrays = {}
    for arch in STRIDED:
        for stride in (16, 8):
            model = reference_model(arch, output_stride=stride)
            maps = []
            model.stages.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output))
            for height, width in SIZES:
                key = f"{arch}:{stride}:{height}x{width}"
                arrays[f"{key}:logits"] = model(image_batch(height, width)).numpy()
                arrays[f"{key}:map"] = maps.pop()[0, :CHANNELS].numpy()
    np.savez_compressed(HERE / "timm_output_strides.npz", **arrays)


@torch.inference_mode()
def main():
    torch.set_num_threads(1)
    write_output_strides()
    arrays = {}
    architectures = {}
    state_shapes = {}
    for arch in ARCHITECTURES:
        shapes, small = shapes_only(arch, CLASSES)
        _, large = shapes_only(arch, 1000)
        entry = {"parameters": {"1000": large, "10": small}, "state_sha256": state_digest(shapes)}
        if arch in LISTED:
            state_shapes[arch] = shapes
        if arch not in WITHOUT_LOGITS:
            logits, rounding = logits_and_rounding(arch)
            for (height, width), array in logits.items():
                arrays[f"{arch}:{height}x{width}"] = array
            entry["rounding"] = {f"{h}x{w}": float(f"{value:.1e}") for (h, w), value in rounding.items()}
            spread = {f"{h}x{w}": float(array.std()) for (h, w), array in logits.items()}
            print(arch, entry["rounding"], "logit std", spread, flush=True)
        architectures[arch] = entry
        gc.collect()
    np.savez_compressed(HERE / "timm_golden.npz", **arrays)
    document = {
        "timm": timm.__version__,
        "torch": torch.__version__.split("+")[0],
        "architectures": architectures,
        "state_shapes": state_shapes,
    }
    # One line per architecture: small, and readable as a difference.
    parts = []
    for key, value in document.items():
        if isinstance(value, dict):
            lines = ",\n".join(
                f"{json.dumps(name)}: {json.dumps(item, separators=(',', ':'))}" for name, item in value.items()
            )
            parts.append(f"{json.dumps(key)}: {{\n{lines}\n}}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    (HERE / "timm_golden.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
