"""What an epoch adds up: loss, right answers, clipped units."""

from __future__ import annotations

import torch
from torch import Tensor


class Meters:
    """Sums over an epoch's steps, kept on the device so that reading them is the only wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        # Moved with a dimension: a lazy device would write a number without one into its program, and compile anew.
        # Each is a tensor of its own for the same reason.
        self.loss_sum, self.correct, self.seen, self.clipped, self.loss, self.norm = (
            torch.zeros(1).to(self.device).reshape(()) for _ in range(6)
        )

    def restore(self, sums: list[float], clipped: float) -> None:
        self.loss_sum, self.correct, self.seen = (torch.tensor(v, device=self.device) for v in sums)
        self.clipped = torch.tensor(clipped, device=self.device)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        self.loss = loss.detach()
        usable = self.loss.isfinite()
        self.loss_sum = self.loss_sum + torch.where(usable, self.loss, 0) * len(labels)
        self.correct = self.correct + usable * (logits.detach().argmax(1) == labels).sum()
        self.seen = self.seen + usable * len(labels)

    def sums(self) -> Tensor:
        """Loss times images, right answers, images."""
        return torch.stack([self.loss_sum, self.correct, self.seen])
