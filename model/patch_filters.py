"""A vision encoder for a few thousand photos: filters made of their own patches, averaged over the cells of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from model.config import ModelConfig
from model.text import run_layer
from model.vision_encoder import VISION, VisionEncoder
from runtime.errors import UserError

FILE = "model.safetensors"  # of the filters, in the folder that vision_encoder.pretrained names
CONTRAST = 0.04  # added to the variance of a patch, of pixels in [-1, 1]: flat patches stay flat
WHITENING = 0.1  # added to the variances of the patches' principal components
SMALLEST = 1e-8  # under a square root
SEED = 0  # of the choice of patches


def contrast_normalized(patches: torch.Tensor) -> torch.Tensor:
    """Patches (N, P) with mean 0 and, unless they are flat, standard deviation 1."""
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + CONTRAST).sqrt()


class PatchFilters(nn.Module):
    """Responses of whitened patches of photos, by the cells of a grid.

    Each patch of an image is normalised in contrast and compared with the filters; what exceeds a threshold is averaged
    over each cell and over the image, its square root standardised. Coates, Ng, Lee: "An Analysis of Single-Layer
    Networks in Unsupervised Feature Learning" (2011); with random patches as the dictionary: Coates, Ng, "The
    Importance of Encoding Versus Training with Sparse Coding and Vector Quantization" (2011).
    """

    def __init__(self, filters: int, size: int, stride: int, grid: int) -> None:
        """Random filters; `learn` makes them those of photos."""
        super().__init__()
        self.size, self.stride, self.grid = size, stride, grid
        self.filters = nn.Parameter(torch.empty(filters, 3, size, size))
        self.threshold = nn.Parameter(torch.ones(filters))
        self.mean = nn.Parameter(torch.zeros(grid**2 + 1, filters))
        self.scale = nn.Parameter(torch.ones(grid**2 + 1, filters))
        nn.init.normal_(self.filters, std=1 / math.sqrt(3 * size**2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (N, 3, H, W) to features (N, 1 + grid², filters): the whole image, then row after row."""
        return (self._responses(images) - self.mean) * self.scale

    def _responses(self, images: torch.Tensor) -> torch.Tensor:
        centred = self.filters - self.filters.mean((1, 2, 3), keepdim=True)
        exact = images.float()  # bf16 has too few digits for the difference of two squares, fp16 for SMALLEST
        mean = functional.avg_pool2d(exact.mean(1, keepdim=True), self.size, self.stride)
        square = functional.avg_pool2d(exact.square().mean(1, keepdim=True), self.size, self.stride)
        contrast = ((square - mean.square()).clamp(min=0) + CONTRAST).rsqrt().to(images.dtype)
        found = functional.conv2d(images, centred, stride=self.stride) * contrast
        above = functional.relu(found - self.threshold[:, None, None])
        cells = functional.adaptive_avg_pool2d(above, self.grid).flatten(2)
        whole = above.mean((2, 3))[..., None]
        return torch.cat([whole, cells], 2).mT.float().add(SMALLEST).sqrt().to(images.dtype)

    @torch.no_grad()
    def learn(self, batches: Iterable[torch.Tensor]) -> int:
        """Take the filters from normalised images, in batches (N, 3, H, W); returns how many images there were.

        Their patches are whitened (ZCA) and some of them, at random, become the filters.
        """
        images = list(batches)
        generator = torch.Generator().manual_seed(SEED)
        count, length = sum(map(len, images)), self.filters[0].numel()
        of_each = math.ceil(max(len(self.filters), 300 * length) / count)
        patches = torch.cat([self._random_patches(batch, of_each, generator) for batch in images])
        normalized = contrast_normalized(patches)
        mean = normalized.mean(0)
        variances, components = torch.linalg.eigh(torch.cov((normalized - mean).T))
        whitening = components @ torch.diag((variances.clamp(min=0) + WHITENING).rsqrt()) @ components.T
        chosen = torch.randperm(len(normalized), generator=generator)[: len(self.filters)]
        directions = functional.normalize((normalized[chosen] - mean) @ whitening, dim=1) @ whitening
        self.filters.copy_(directions.view_as(self.filters))
        self.threshold.copy_(1 + directions @ mean)
        features = torch.cat([self._responses(batch) for batch in images])
        self.mean.copy_(features.mean(0))
        self.scale.copy_(1 / (features.std(0, correction=0) + 0.01))
        return count

    def _random_patches(self, images: torch.Tensor, of_each: int, generator: torch.Generator) -> torch.Tensor:
        """Patches (N · of_each, P) at random places."""
        places = images.unfold(2, self.size, 1).unfold(3, self.size, 1)  # (N, 3, rows, columns, size, size)
        drawn = (len(images), of_each)
        rows, columns = (torch.randint(places.shape[axis], drawn, generator=generator) for axis in (2, 3))
        which = torch.arange(len(images))[:, None]
        return places[which, :, rows, columns].flatten(0, 1).flatten(1)


@VISION("patch_filters")
class PatchFilterEncoder(VisionEncoder):
    """Linear maps of `PatchFilters`, one for each cell of the grid; the pooled vector is their sum.

    It learns from few photos what deeper networks need many for, because its filters are not learned from the captions:
    `python -m train.filters` makes them of the photos, `vision_encoder.pretrained` names its folder, and
    `freeze: [vision_encoder.filters]` keeps them.
    """

    def __init__(
        self,
        config: ModelConfig,
        filters: int = 300,
        size: int = 6,
        stride: int = 2,
        grid: int = 4,
        dropout: float = 0.5,
    ) -> None:
        """filters: how many; size, stride: of a patch, in pixels; grid: cells in a row; dropout: of their features."""
        super().__init__()
        if min(filters, size, stride, grid) < 1 or (config.image_res - size) // stride + 1 < grid:
            raise UserError(
                f"vision_encoder.options {filters=} {size=} {stride=} {grid=} does not fit image_res="
                f"{config.image_res}: a row of the image must have a patch for each cell of the grid"
            )
        self.filters = PatchFilters(filters, size, stride, grid)
        self.dropout = nn.Dropout(dropout)
        self.maps = nn.Parameter(torch.empty(grid**2 + 1, filters, config.vision_encoder.width))
        nn.init.normal_(self.maps, std=0.1 / math.sqrt(self.maps[..., 0].numel()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `VisionEncoder`."""
        features = self.dropout(run_layer(self.filters, self.recompute, images))
        cells = torch.einsum("ncf,cfd->ncd", features, self.maps)
        pooled = cells.sum(1)
        return torch.cat([pooled[:, None], cells[:, 1:]], 1), pooled

    def from_published(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `VisionEncoder`: the filters; the maps keep their initial values."""
        return {"maps": self.maps.detach(), **{f"filters.{name}": tensor for name, tensor in state.items()}}
