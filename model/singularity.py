"""The Singularity model for pre-training and retrieval: dual encoder (VTC), matching (VTM) and MLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from model.config import ModelConfig
from model.encoders import Encoders
from model.fusion import CrossAttentionKeys
from model.heads import MLMHead, ScoreHead
from model.losses import (
    Losses,
    LossInputs,
    mask_tokens,
    masked_positions,
    max_masked,
    negative_weights,
    same_visual,
    sample_negatives,
)
from runtime.collectives import gather_with_gradient

TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True)
class RandomChoices:
    """The random choices of one training forward; what is None is sampled.

    negative_visuals and negative_texts (B,): row of the negative of each text and of each visual, with
    `gather_negatives` among the rows of all ranks;
    masked_ids and labels (B, Lt), labels -100 where a token is not to be predicted.
    """

    negative_visuals: torch.Tensor | None = None
    negative_texts: torch.Tensor | None = None
    masked_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class Singularity(Encoders):
    """Model of `config`, with random initial weights.

    `pad_id`, `cls_id`, `mask_id` are the vocabulary's (defaults: bert-base-uncased). `mean` and `std` are those that
    pixels in [0, 1] are normalised with.
    """

    def __init__(self, config: ModelConfig, pad_id: int = 0, cls_id: int = 101, mask_id: int = 103) -> None:
        super().__init__(config, pad_id)
        self.cls_id, self.mask_id = cls_id, mask_id
        text_width = config.text_encoder.width
        self.vision_proj = nn.Linear(config.vision_encoder.width, config.embed_dim)
        self.text_proj = nn.Linear(text_width, config.embed_dim)
        # A matrix of one entry: DeepSpeed refuses parameters without dimensions, and vectors would not decay.
        self.temp = nn.Parameter(torch.full((1, 1), config.temp))
        self.itm_head = ScoreHead(text_width, 2)
        # Its name in state dicts, of old checkpoints too.
        self.word_head = MLMHead(config.text_encoder) if config.loss_weight.mlm > 0 else None
        weights = vars(config.loss_weight).items()
        self.losses = Losses(config, {name: weight for name, weight in weights if name != "mlm" or weight > 0})

    def project_visual(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (..., D) to unit vectors (..., E) in float32."""
        return functional.normalize(self.vision_proj(pooled).float(), dim=-1)

    def project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (..., D) of texts to unit vectors (..., E) in float32."""
        return functional.normalize(self.text_proj(pooled).float(), dim=-1)

    def match_logits(
        self,
        text_states: torch.Tensor,
        text_mask: torch.Tensor,
        visual: torch.Tensor | CrossAttentionKeys,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Two-way logits (P, 2), column 1 for a match, of P pairs of a text and one of N visuals.

        text_states (P, Lt, D) of `encode_text`, text_mask (P, Lt). visual: tokens (N, S, D), or their `visual_keys`.
        Without `index` row g·N + n belongs to visual n (N = P: row by row); with `index` (P,) row p to visual index[p].
        """
        keys = self.visual_keys(visual) if isinstance(visual, torch.Tensor) else visual
        return self.match_attended(self.text_encoder.attend_texts(text_states, text_mask), text_mask, keys, index)

    def match_attended(
        self,
        attended: torch.Tensor,
        text_mask: torch.Tensor,
        visual: CrossAttentionKeys,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`match_logits` from the result of `text_encoder.attend_texts`: (P, Lt, D) to (P, 2)."""
        return self.itm_head(self.text_encoder.fuse_pairs(attended, text_mask, visual, index)[0])

    def temperature(self) -> torch.Tensor:
        """The temperature (1, 1) for a training step; clamps the parameter itself to its range."""
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURE_RANGE)
        return self.temp.float()

    def similarity(self, pooled_visual: torch.Tensor, pooled_text: torch.Tensor) -> torch.Tensor:
        """Cosine similarities (N, M), mean over frames, of pooled (N, T, D) and (M, D); float32, no temperature."""
        return self.project_visual(pooled_visual).mean(1) @ self.project_text(pooled_text).T

    def _mask_tokens(self, input_ids: torch.Tensor, choices: RandomChoices) -> tuple[torch.Tensor, torch.Tensor]:
        if choices.masked_ids is not None and choices.labels is not None:
            return choices.masked_ids, choices.labels
        vocab_size = self.config.text_encoder.vocab_size
        kept = (self.pad_id, self.cls_id)
        return mask_tokens(input_ids, self.config.mlm_prob, vocab_size, self.mask_id, kept)

    def forward(
        self,
        frames: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        idx: torch.Tensor,
        choices: RandomChoices = RandomChoices(),
        columns: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """Weighted losses `loss_itc` (VTC), `loss_itm` (VTM), where the model has an MLM head `loss_mlm`, and those of
        `config.losses`.

        frames (B, T, 3, H, W) normalised, input_ids and attention_mask (B, Lt), idx (B,): identities of the visuals.
        columns: of the batch, for losses.
        """
        tokens, pooled = self.encode_visual(frames)
        keys = self.visual_keys(tokens)

        # One traversal of the text-only layers: the texts and, for MLM, their masked versions.
        all_ids, all_masks, labels = input_ids, attention_mask, None
        if self.word_head is not None:
            masked_ids, labels = self._mask_tokens(input_ids, choices)
            all_ids, all_masks = torch.cat([input_ids, masked_ids]), torch.cat([attention_mask, attention_mask])
        all_states = self.text_encoder(all_ids, all_masks)
        states = all_states[: len(input_ids)]

        visual, text = self.project_visual(pooled).mean(1), self.project_text(self.pool_text(states, attention_mask))
        all_idx, temperature = self._gather(idx), self.temperature()
        all_text, all_visual = self._gather(text), self._gather(visual)
        to_text, to_visual = visual @ all_text.T / temperature, text @ all_visual.T / temperature
        same = same_visual(idx, all_idx)
        negatives = self._negatives(to_text, to_visual, same, choices)
        first, whole = self._fuse(tokens, keys, all_states, attention_mask, all_masks, *negatives)
        match_logits, mlm_logits = self.itm_head(first), None
        if labels is not None:
            limit = labels.numel() if choices.labels is not None else max_masked(labels.numel(), self.config.mlm_prob)
            mlm_logits, labels = self._mlm_logits(whole, labels, limit)
        inputs = LossInputs(
            tokens=tokens, pooled=pooled, input_ids=input_ids, attention_mask=attention_mask, text_states=states,
            idx=idx, visual=visual, text=text, all_idx=all_idx, all_visual=all_visual, all_text=all_text, same=same,
            temperature=temperature, to_text=to_text, to_visual=to_visual, match_states=first,
            match_logits=match_logits, mlm_logits=mlm_logits, mlm_labels=labels, columns=columns,
        )  # fmt: skip
        return self.losses.compute(inputs)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, ...) of this rank, or with `gather_negatives` those (N, ...) of all ranks."""
        return gather_with_gradient(rows) if self.config.gather_negatives else rows

    def _fuse(
        self,
        tokens: torch.Tensor,
        keys: CrossAttentionKeys,
        all_states: torch.Tensor,
        attention_mask: torch.Tensor,
        all_masks: torch.Tensor,
        negative_visuals: torch.Tensor,
        negative_texts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First tokens (3B, D) of the pairs, of visuals with negative texts and of texts with negative visuals, and all
        tokens (B, Lt, D) of the masked texts, from states and masks of texts and masked texts.

        One traversal of the fusion layers. The first layer's self-attention does not depend on the visual and is
        computed once for each text.
        """
        batch = len(attention_mask)
        attended = self.text_encoder.attend_texts(all_states, all_masks)
        texts, masked = attended[:batch], len(attended) - batch
        rows = [attended[batch:], texts, self._gather(texts)[negative_texts]]
        masks = [all_masks[batch:], attention_mask, self._gather(attention_mask)[negative_texts]]
        if not self.config.gather_negatives:
            pairs, pair_masks = torch.cat([*rows, texts]), torch.cat([*masks, attention_mask])
            return self.text_encoder.fuse_pairs(pairs, pair_masks, keys, negative_visuals, whole=masked)
        first, whole = self.text_encoder.fuse_pairs(torch.cat(rows), torch.cat(masks), keys, whole=masked)
        others = self.visual_keys(self._gather(tokens)[negative_visuals])
        return torch.cat([first, self.text_encoder.fuse_pairs(texts, attention_mask, others)[0]]), whole

    def _mlm_logits(self, states: torch.Tensor, labels: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (limit, V) and labels (limit,) of MLM, from fused states (B, Lt, D) and labels (B, Lt), of which at
        most `limit` are not -100."""
        assert self.word_head is not None
        chosen = masked_positions(labels, limit)
        logits = self.word_head(states.flatten(0, 1)[chosen], self.text_encoder.word_matrix())
        return logits, labels.flatten()[chosen]

    @torch.no_grad()
    def _negatives(
        self, to_text: torch.Tensor, to_visual: torch.Tensor, same: torch.Tensor, choices: RandomChoices
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B,) of each text's negative visual and of each visual's negative text, from (B, N) similarities."""
        hard = self.config.itm_hard_neg
        visuals, texts = choices.negative_visuals, choices.negative_texts
        if visuals is None:
            visuals = sample_negatives(negative_weights(to_visual, same, hard))
        if texts is None:
            texts = sample_negatives(negative_weights(to_text, same, hard))
        return visuals, texts
