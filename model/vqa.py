"""Question answering: the same encoders, and a causal decoder that scores answers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from model.bert import PADDED, bert_config, initialize_bert, run_layer
from model.config import ModelConfig, TextConfig
from model.encoders import Encoders
from model.fusion import CrossAttentionKeys, FusionLayer
from model.heads import MLMHead
from model.losses import IGNORED, AnswerLossInputs, Losses
from model.scoring import combine
from model.torchvision_cpu import BertEmbeddings

_MASKED_SCORE = -1e9  # added to cross-attention scores of padded question tokens; -1e4 in half precision


def causal_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(A, La) of ones and zeros to (A, 1, La, La): 0 where a token may attend, -10000 at later and padded ones."""
    length = attention_mask.shape[1]
    seen = attention_mask.new_ones(length, length).tril()
    return ((1 - (seen * attention_mask[:, None, :]).to(dtype)) * PADDED)[:, None]


class AnswerDecoder(nn.Module):
    """Causal BERT layers with cross-attention to the states of a question and its visual."""

    def __init__(self, config: TextConfig, num_layers: int, pad_id: int = 0) -> None:
        super().__init__()
        bert = bert_config(config, pad_id=pad_id)
        self.recompute = False
        self.embeddings = BertEmbeddings(bert)
        self.layer = nn.ModuleList(FusionLayer(bert, config.width) for _ in range(num_layers))
        self.word_head = MLMHead(config)
        initialize_bert(self, config.initializer_range)

    def project(self, question_states: torch.Tensor) -> CrossAttentionKeys:
        """Question states (B, Lq, D) to the keys and values that the layers read, once for all answers."""
        return tuple(cast(FusionLayer, layer).project(question_states) for layer in self.layer)

    def forward(
        self,
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        questions: CrossAttentionKeys,
        question_mask: torch.Tensor,
        index: torch.Tensor | None = None,
        exact: bool = False,
    ) -> torch.Tensor:
        """Logits (A, La, V) at every position of the answers (A, La); `exact`: in float32, for ranking.

        Without `index`, answer i belongs to question i mod B; with `index` (A,) answer a belongs to question index[a].
        """
        states = self.embeddings(answer_ids)
        dtype = states.dtype
        self_mask = causal_mask(answer_mask, dtype)
        hidden = -1e4 if dtype == torch.float16 else _MASKED_SCORE
        cross_mask = ((1 - question_mask[:, None, None, :].to(dtype)) * hidden).to(dtype)
        for layer, (keys, values) in zip(self.layer, questions, strict=True):
            states = run_layer(layer, self.recompute, states, self_mask, keys, values, index, cross_mask)
        return self.word_head(states, self.embeddings.word_embeddings.weight, exact)


def answer_losses(logits: torch.Tensor, answer_ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Summed negative log-likelihood (A,) float32 of each answer (A, La) after its first token."""
    labels = answer_ids[:, 1:].masked_fill(answer_ids[:, 1:] == pad_id, IGNORED)
    each = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view_as(labels).sum(1)


def _leading(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of each row of scores (B, C) and their indices.

    The sort is stable, unlike topk: answers with the same first token have equal scores.
    """
    ordered, indices = scores.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], indices[:, :k]


class SingularityQA(Encoders):
    """Singularity for questions: an answer decoder instead of dual encoder and matching head."""

    def __init__(self, config: ModelConfig, pad_id: int = 0, cls_id: int = 101, mask_id: int = 103) -> None:
        super().__init__(config, pad_id)
        self.cls_id, self.mask_id = cls_id, mask_id
        self.answer_decoder = AnswerDecoder(config.text_encoder, config.answer_decoder.num_layers, pad_id)
        self.losses = Losses(config, {"qa": 1.0})

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """As `Encoders.set_gradient_checkpointing`, for the answer decoder too."""
        super().set_gradient_checkpointing(enable)
        self.answer_decoder.recompute = enable

    def question_states(self, visual_tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States (B, Lq, D) of questions (B, Lq) fused with their visual's tokens (B, S, D)."""
        return self.text_encoder.fuse(self.text_encoder(ids, mask), mask, self.visual_keys(visual_tokens))

    def forward(
        self,
        frames: torch.Tensor,
        question_ids: torch.Tensor,
        question_mask: torch.Tensor,
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        answer_weights: torch.Tensor,
        per_question: torch.Tensor,
        columns: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """Loss `loss_qa`: the weighted sum of the answers' losses over the number of questions; those of
        `config.losses`.

        frames (B, T, 3, H, W); questions (B, Lq); the A answers (A, La) of all questions, in order of the questions,
        their weights (A,), and the number of answers of each question, per_question (B,). columns: of the batch, for
        losses.
        """
        tokens, pooled = self.encode_visual(frames)
        states = self.question_states(tokens, question_ids, question_mask)
        batch, answers = frames.shape[0], answer_ids.shape[0]
        owner = torch.arange(batch, device=frames.device).repeat_interleave(per_question, output_size=answers)
        questions = self.answer_decoder.project(states)
        logits = self.answer_decoder(answer_ids, answer_mask, questions, question_mask, owner)
        losses = answer_losses(logits, answer_ids, self.pad_id)
        inputs = AnswerLossInputs(
            tokens=tokens, pooled=pooled, question_states=states, question_mask=question_mask, answer_ids=answer_ids,
            answer_mask=answer_mask, answer_weights=answer_weights, owner=owner, logits=logits, answer_losses=losses,
            columns=columns,
        )  # fmt: skip
        return self.losses.compute(inputs)

    def frame_states(self, tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Question states for `rank_answers`, F times (B, Lq, D), from tokens (B, F, S, D) of `clip_tokens`."""
        return [self.question_states(each, ids, mask) for each in tokens.unbind(1)]

    def first_token_probabilities(
        self, questions: list[CrossAttentionKeys], question_mask: torch.Tensor, start_id: int, ensemble: str
    ) -> torch.Tensor:
        """Probability (B, V) of each token to be the first of the answer.

        Late ensembles combine the frames' probabilities and apply a second softmax, as the official code does.
        """
        start = question_mask.new_full((question_mask.shape[0], 1), start_id)
        ones = torch.ones_like(start)
        first_token_probability = torch.stack(
            [self.answer_decoder(start, ones, keys, question_mask, exact=True)[:, 0].softmax(1) for keys in questions]
        )
        if ensemble == "concat":
            return first_token_probability[0]
        return combine(first_token_probability, ensemble).softmax(1)

    @torch.no_grad()
    def rank_answers(
        self,
        states: list[torch.Tensor],
        question_mask: torch.Tensor,
        answer_ids: torch.Tensor,
        answer_mask: torch.Tensor,
        k: int,
        ensemble: str = "concat",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k most likely of C candidate answers (C, La), best first: indices and probabilities, both (B, k).

        states: of `frame_states`. The probability of the first token selects k candidates, ranked by the sum of its
        logarithm and the log-likelihood of the whole answer. The first token counts twice, as in the official code.
        """
        questions = [self.answer_decoder.project(each) for each in states]
        first_token_probability = self.first_token_probabilities(
            questions, question_mask, int(answer_ids[0, 0]), ensemble
        )
        k = min(k, answer_ids.shape[0])
        first_probability, candidates = _leading(first_token_probability[:, answer_ids[:, 1]], k)  # (B, k)
        order = candidates.T.flatten()  # candidate g of question b at g·B + b
        ids, mask = answer_ids[order], answer_mask[order]
        scores = torch.stack(
            [first_probability.log() - self._losses(ids, mask, keys, question_mask).view(k, -1).T for keys in questions]
        )
        probability, rank = _leading(combine(scores, ensemble).softmax(1), k)
        return candidates.gather(1, rank), probability

    def _losses(
        self, ids: torch.Tensor, mask: torch.Tensor, questions: CrossAttentionKeys, question_mask: torch.Tensor
    ) -> torch.Tensor:
        logits = self.answer_decoder(ids, mask, questions, question_mask, exact=True)
        return answer_losses(logits, ids, self.pad_id)
