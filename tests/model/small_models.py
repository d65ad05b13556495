"""Small models and batches for the tests of this folder."""

import torch

from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity

PAD, CLS, MASK, VOCAB = 0, 2, 4, 60


def small_config(layers=4, **changes):
    """`layers` of text, the upper half with fusion; half as many vision layers."""
    config = ModelConfig(
        vision_encoder=VisionConfig(patch_size=8, width=48, depth=layers // 2, heads=3, drop_path=0.0),
        text_encoder=TextConfig(
            vocab_size=VOCAB,
            width=32,
            layers=layers,
            fusion_layer=layers // 2,
            heads=2,
            intermediate=64,
            max_positions=24,
            dropout=0.0,
        ),
        image_res=32,
        embed_dim=16,
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return Singularity(small_config(**changes), PAD, CLS, MASK)


def small_batch(pairs=4, frames=1, length=7, size=32, seed=1):
    """frames (B, T, 3, H, W), ids, mask (B, Lt), idx (B,): the last text is padded."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(pairs, frames, 3, size, size, generator=generator)
    ids = torch.randint(5, VOCAB, (pairs, length), generator=generator)
    ids[:, 0] = CLS
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return images, ids * mask, mask, torch.arange(pairs)
