"""Explain where in an image a classifier finds a class: Grad-CAM and occlusion, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nfzoo.analysis.style import ORANGE
from nfzoo.config import ModelConfig, Preprocessing
from nfzoo.errors import ConfigError
from nfzoo.model import apply, feature_blocks, plan, run_block

METHODS = ("gradcam", "occlusion")

_PATCHES = 8  # side by side along an edge


def explain(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor, method: str, *, batch_size: int = 32) -> Tensor:
    """Return how much each pixel speaks for the most probable class, `(N, H, W)`, from 0 to a maximum of 1.

    Pixels that speak against it are 0, and so are all if none speaks for it.

    Args:
        cfg, params: the model.
        x: normalised images `(N, C, H, W)`.
        method: one of `METHODS`: see `grad_cam`, whose map is scaled up, and `occlusion`.
        batch_size: images at a time in `occlusion`.

    Raises:
        ConfigError: for another method, and for `gradcam` where the last map has one pixel.
    """
    if method not in METHODS:
        raise ConfigError(f"explanations are {' or '.join(METHODS)}, not {method!r}")
    with torch.no_grad():
        classes = apply(cfg, params, x).argmax(1)
    if method == "gradcam":
        heat = grad_cam(cfg, params, x, classes)
        if heat.shape[1:] == (1, 1):
            raise ConfigError(
                f"the last feature map of an image of {x.shape[2]} x {x.shape[3]} has one pixel, which gradcam cannot "
                "tell apart; use occlusion"
            )
        heat = F.interpolate(heat[:, None].float(), x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    else:
        patch = max(1, min(x.shape[2:]) // _PATCHES)
        heat = occlusion(cfg, params, x, classes, patch=patch, stride=max(1, patch // 2), batch_size=batch_size)
    heat = heat.clamp(min=0)
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)


def grad_cam(cfg: ModelConfig, params: Mapping[str, Tensor], x: Tensor, classes: Tensor) -> Tensor:
    """Return Grad-CAM of the last map A of `nfzoo.model.features`, `(N, h, w)`.

        L = ReLU(sum_k alpha_k A_k),    alpha_k = mean over pixels of d logit / d A_k

    Args:
        cfg, params: the model.
        x: normalised images `(N, C, H, W)`.
        classes: the class of each image whose logit is meant, `(N,)`.

    Source: arXiv 1610.02391, equations 1 and 2.
    """
    tower = feature_blocks(cfg)
    with torch.no_grad():
        for block in tower:
            x = run_block(block, params, x)
    with torch.enable_grad():
        a = y = x.detach().requires_grad_()
        for block in plan(cfg)[len(tower) :]:
            y = run_block(block, params, y)
        (gradient,) = torch.autograd.grad(y.gather(1, classes[:, None]).sum(), a)
    alpha = gradient.mean((2, 3), keepdim=True)
    return (alpha * a.detach()).sum(1).relu()


@torch.no_grad()
def occlusion(
    cfg: ModelConfig,
    params: Mapping[str, Tensor],
    x: Tensor,
    classes: Tensor,
    *,
    patch: int,
    stride: int,
    batch_size: int = 32,
) -> Tensor:
    """Return how much the logit falls where a grey square covers a pixel, `(N, H, W)`, the mean over such squares.

    The squares are 0, the mean colour. The last of a row or column ends at the image's edge.

    Args:
        cfg, params: the model.
        x: normalised images `(N, C, H, W)`.
        classes: the class of each image whose logit is meant, `(N,)`.
        patch: side of the square in pixels.
        stride: distance of two squares in pixels.
        batch_size: images that are computed at a time.

    Source: arXiv 1311.2901, section 4.2.
    """
    n, _, height, width = x.shape
    clean = apply(cfg, params, x).gather(1, classes[:, None])[:, 0].float()
    corners = [(top, left) for top in _starts(height, patch, stride) for left in _starts(width, patch, stride)]
    total, covered = x.new_zeros((n, height, width), dtype=torch.float32), x.new_zeros((height, width))
    jobs = [(i, corner) for corner in corners for i in range(n)]
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        rows = torch.tensor([i for i, _ in part], device=x.device)
        batch = x[rows]
        for row, (_, (top, left)) in enumerate(part):
            batch[row, :, top : top + patch, left : left + patch] = 0
        falls = clean[rows] - apply(cfg, params, batch).gather(1, classes[rows][:, None])[:, 0].float()
        for fall, (i, (top, left)) in zip(falls, part, strict=True):
            total[i, top : top + patch, left : left + patch] += fall
    for top, left in corners:
        covered[top : top + patch, left : left + patch] += 1
    return total / covered


def _starts(length: int, patch: int, stride: int) -> list[int]:
    last = max(0, length - patch)
    return [*range(0, last, stride), last]


def overlay(x: Tensor, heat: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Return a normalised image `(C, H, W)` as a light grey picture, with `heat` `(H, W)` from 0 to 1 in orange."""
    channels = len(preprocessing.mean)
    mean, std = (torch.tensor(v).view(channels, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    grey = ((x.float().cpu() * std + mean).mean(0).clamp(0, 1) * 200 + 55).numpy()[..., None]
    colour = np.array([int(ORANGE[i : i + 2], 16) for i in (1, 3, 5)])
    share = 0.75 * heat.float().cpu().numpy()[..., None]
    return Image.fromarray((grey * (1 - share) + colour * share).round().astype(np.uint8))
