"""A small model, vocabulary and test set that lie in memory, for tests of evaluation."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from loaders.config import LoaderConfig, PerMedia
from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity
from model.vqa import SingularityQA

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["red", "blue", "green", "square", "circle", "star", "left", "right", "up", "down", "two", "three", "of", "a"]


class Words:
    """A tokenizer of whole words, [CLS] first."""

    vocab_size, pad_id, cls_id, mask_id = len(WORDS), 0, 2, 4

    def encode(self, texts, max_length):
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [2, *(WORDS.index(word) for word in text.split())][:max_length]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids, (ids > 0).long()

    def clean(self, text):
        return text


def small_model(tokenizer=None, kind=Singularity, seed=0, **changes):
    """A model whose random weights make every score depend on its pair."""
    tokenizer = tokenizer or Words()
    torch.manual_seed(seed)
    vision = VisionConfig(patch_size=8, width=32, depth=2, heads=2)
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=4, fusion_layer=2, heads=2, intermediate=64, max_positions=40
    )
    config = ModelConfig(vision, text, **{"image_res": 32, "embed_dim": 16, **changes})
    config.answer_decoder.enable = kind is SingularityQA
    model = kind(config, tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id).eval()
    for parameter in (parameter for parameter in model.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(parameter, 0, 0.3)
    return model


@dataclass
class Drawn:
    """Random clips with one to three texts each, and texts that several clips share; `broken` clips are left out."""

    num_visuals: int = 13
    num_frames: int = 2
    shared: bool = True
    broken: tuple[int, ...] = ()
    name: str = "drawn"
    media_type: str = "video"
    digest: str = "drawn"
    missing: dict[int, str] = field(default_factory=dict)
    config: LoaderConfig = field(default_factory=lambda: LoaderConfig(max_txt_l=PerMedia(12, 12)))

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)
        shape = (self.num_visuals, self.num_frames, 32, 32, 3)
        self.pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.sources = [f"clips/{i:03}.mp4" for i in range(self.num_visuals)]
        self.texts, self.visuals_of_text = [], []
        self.texts_of_visual = [[] for _ in range(self.num_visuals)]
        for visual in range(self.num_visuals):
            for _ in range(1 + visual % 3):
                length = int(torch.randint(2, 9, (1,), generator=generator))
                words = torch.randint(5, len(WORDS), (length,), generator=generator).tolist()
                self.add(" ".join(WORDS[word] for word in words), [visual])
        if self.shared:
            self.add("a star", [0, 4, 7])

    def add(self, text, visuals):
        for visual in visuals:
            self.texts_of_visual[visual].append(len(self.texts))
        self.texts.append(text)
        self.visuals_of_text.append(visuals)

    def as_written(self, texts, clean):
        return [clean(text) for text in texts]

    def batches(self, num_frames, batch_size, rank=0, world_size=1, device="cpu"):
        own = [i for i in range(self.num_visuals) if i % world_size == rank]
        for i in set(own) & set(self.broken):
            self.missing[i] = "truncated JPEG"
        good = torch.tensor([i for i in own if i not in self.broken], dtype=torch.int64)
        for indices in good.split(batch_size):
            if len(indices):
                yield SimpleNamespace(frames=self.pixels[indices, :num_frames], indices=indices)
