"""The space in which images are optimised: learning rates, noise and penalties are in units of the source's std."""

import torch
from torch import Tensor

from .recipe import Source


class Space:
    """The map between stored images, the optimised `z` and what networks see. Shapes (B, 3, s, s)."""

    def __init__(self, source: Source, device: torch.device):
        self.mean = torch.tensor(source.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(source.std, device=device).view(1, 3, 1, 1)

    def to_z(self, images: Tensor) -> Tensor:
        """uint8 to normalised float32."""
        return self.normalise(images.to(self.mean.device).float() / 255)

    def normalise(self, x: Tensor) -> Tensor:
        """[0, 1] to normalised float."""
        return (x - self.mean) / self.std

    def to_x(self, z: Tensor) -> Tensor:
        """Normalised float to [0, 1]."""
        return z * self.std + self.mean

    def clamp(self, z: Tensor) -> None:
        """Keeps x in [0, 1], in place."""
        with torch.no_grad():
            z.clamp_(-self.mean / self.std, (1 - self.mean) / self.std)

    def to_bytes(self, z: Tensor) -> Tensor:
        """Normalised float to uint8 on the CPU, rounded."""
        return self.to_x(z).mul(255).round().clamp(0, 255).to(torch.uint8).cpu()
