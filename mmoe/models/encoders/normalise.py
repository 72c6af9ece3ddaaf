"""From the pixels that every encoder is given to those that one was trained on.

Torch only: the Hugging Face export ships this very file.
"""

import torch
from torch import Tensor

from mmoe.recipe.model import Encoder


def renormalise(pixels: Tensor, config: Encoder) -> Tensor:
    """(x/255 − 0.5) · 4 → (x/255 − ``config.mean``) / ``config.std`` for each channel of [n, 3, H, W], same dtype."""
    # Plain numbers, no buffers: there is nothing to save, to move between devices or to materialise from meta.
    affine = [(0.25 / std, (0.5 - mean) / std) for mean, std in zip(config.mean, config.std, strict=True)]
    if all(pair == (1.0, 0.0) for pair in affine):
        return pixels
    return torch.stack([pixels[:, c] * scale + shift for c, (scale, shift) in enumerate(affine)], dim=1)
