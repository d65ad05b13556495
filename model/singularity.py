"""The Singularity model for pre-training and retrieval: dual encoder (VTC), matching (VTM) and MLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from model.config import ModelConfig
from model.encoders import Encoders
from model.losses import (
    contrastive_loss,
    contrastive_targets,
    mask_tokens,
    masked_positions,
    matching_loss,
    max_masked,
    mlm_loss,
    negative_weights,
    same_visual,
    sample_negatives,
)
from model.text import CrossAttentionKeys, MLMHead, ScoreHead
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

    def project_visual(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (..., D) to unit vectors (..., E) in float32."""
        return functional.normalize(self.vision_proj(pooled).float(), dim=-1)

    def project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """First tokens' states (..., D) to unit vectors (..., E) in float32."""
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
    ) -> dict[str, torch.Tensor]:
        """Weighted losses `loss_itc` (VTC), `loss_itm` (VTM) and, where the model has an MLM head, `loss_mlm`.

        frames (B, T, 3, H, W) normalised, input_ids and attention_mask (B, Lt), idx (B,): identities of the visuals.
        """
        weights, batch = self.config.loss_weight, input_ids.shape[0]
        tokens, pooled = self.encode_visual(frames)
        keys = self.visual_keys(tokens)

        # One traversal of the text-only layers: the texts and, for MLM, their masked versions.
        all_ids, all_masks, labels = input_ids, attention_mask, None
        if self.word_head is not None:
            masked_ids, labels = self._mask_tokens(input_ids, choices)
            all_ids, all_masks = torch.cat([input_ids, masked_ids]), torch.cat([attention_mask, attention_mask])
        all_states = self.text_encoder(all_ids, all_masks)
        states = all_states[:batch]

        gather = gather_with_gradient if self.config.gather_negatives else lambda rows: rows
        visual, text = self.project_visual(pooled).mean(1), self.project_text(states[:, 0])
        all_idx, temperature = gather(idx), self.temperature()
        to_text, to_visual = visual @ gather(text).T / temperature, text @ gather(visual).T / temperature
        targets = contrastive_targets(idx, all_idx)
        losses = {"loss_itc": contrastive_loss(to_text, to_visual, targets) * weights.itc}

        # One traversal of the fusion layers: all tokens of the masked texts; only the first token of the true pairs,
        # of visuals with negative texts, and of texts with negative visuals. The first layer's self-attention does not
        # depend on the visual and is computed once for each text.
        same = same_visual(idx, all_idx)
        negative_visuals, negative_texts = self._negatives(to_text, to_visual, same, choices)
        attended = self.text_encoder.attend_texts(all_states, all_masks)
        texts, masked = attended[:batch], len(attended) - batch
        rows = [attended[batch:], texts, gather(texts)[negative_texts]]
        masks = [all_masks[batch:], attention_mask, gather(attention_mask)[negative_texts]]
        if self.config.gather_negatives:
            first, whole = self.text_encoder.fuse_pairs(torch.cat(rows), torch.cat(masks), keys, whole=masked)
            others = self.visual_keys(gather(tokens)[negative_visuals])
            first = torch.cat([first, self.text_encoder.fuse_pairs(texts, attention_mask, others)[0]])
        else:
            rows, masks = [*rows, texts], [*masks, attention_mask]
            first, whole = self.text_encoder.fuse_pairs(
                torch.cat(rows), torch.cat(masks), keys, negative_visuals, whole=masked
            )
        losses["loss_itm"] = matching_loss(self.itm_head(first), (~same).any(1)) * weights.itm
        if labels is not None:
            limit = labels.numel() if choices.labels is not None else max_masked(labels.numel(), self.config.mlm_prob)
            losses["loss_mlm"] = self._mlm_loss(whole, labels, limit) * weights.mlm
        return losses

    def _mlm_loss(self, states: torch.Tensor, labels: torch.Tensor, limit: int) -> torch.Tensor:
        """MLM loss of labels (B, Lt), of which at most `limit` are not -100, from fused states (B, Lt, D)."""
        assert self.word_head is not None
        chosen = masked_positions(labels, limit)
        logits = self.word_head(states.flatten(0, 1)[chosen], self.text_encoder.word_matrix())
        return mlm_loss(logits, labels.flatten()[chosen])

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
