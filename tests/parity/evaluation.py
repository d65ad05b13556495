"""Parity of retrieval scores, answers and multiple choice (cases 05 to 07)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch

from model.config import ENSEMBLES
from model.scoring import match_pairs
from model.singularity import Singularity
from model.vqa import SingularityQA, answer_losses
from tests.parity.comparison import Case, Comparison
from tests.parity.forward import compare_gradients
from tests.parity.text import tokenise

UNSCORED = -100.0
EVERYTHING = 10**9


def match_scores(
    model: Singularity,
    states: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    pairs: torch.Tensor,
    mode: str = "concat",
) -> torch.Tensor:
    """Match logits (N, M) of texts (M, Lt, D) for visuals with tokens (N, F, S, D) where `pairs` (N, M) is true."""
    attended = model.text_encoder.attend_texts(states, mask)
    blocks = [(np.arange(len(tokens)), tokens)]
    visuals, texts, scores = match_pairs(model, blocks, attended, mask, pairs.numpy(), mode)
    result = torch.full(pairs.shape, UNSCORED)
    result[visuals, texts] = torch.from_numpy(scores)
    return result


def reranked(similarity: torch.Tensor, k: int, score: torch.Tensor) -> torch.Tensor:
    """Scores (Q, C) where they are among the k most similar of a row, -100 elsewhere."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return torch.full_like(score, UNSCORED).scatter(1, top, score.gather(1, top))


@torch.no_grad()
def compare_retrieval(folder: Path) -> Comparison:
    """Score matrices of the dual and the cross encoder, all ensembles and cuts, with several texts or visuals."""
    case, result = Case(folder), Comparison(folder.name)
    settings = json.loads((folder / "case.json").read_text())
    recorded = json.loads((folder / "expected.json").read_text())
    model = case.load()
    assert isinstance(model, Singularity)
    cuts = {"": settings["k_test"], "ksmall_": settings.get("k_small", 5), "full_": EVERYTHING}
    for texts in ("", "multiimg_"):
        if f"{texts}text_input_ids" not in case.expected:
            continue
        mask = case.expected[f"{texts}text_attention_mask"]
        frames = case.inputs["frames"][_video_numbers(recorded[f"{texts}dataset"]["image"])]
        states, pooled_text = model.encode_text(case.expected[f"{texts}text_input_ids"], mask)
        for mode in settings.get("modes", ENSEMBLES):
            tokens, pooled = model.encode_clips(frames, mode, skip_temporal=True)
            similarity = model.similarity(pooled, pooled_text)
            scores = match_scores(model, states, mask, tokens, torch.ones_like(similarity, dtype=torch.bool), mode)
            for cut, k in cuts.items():
                matrices = {
                    "i2t_x": reranked(similarity, k, scores),
                    "t2i_x": reranked(similarity.T, k, scores.T),
                    "i2t_emb": similarity,
                    "t2i_emb": similarity.T,
                }
                _close_if_recorded(case, result, matrices, f"{texts}{cut}{mode}_")
            if mode == "concat":
                _close_if_recorded(case, result, {"i2t_x": scores, "t2i_x": scores.T}, f"{texts}xonly_")
    return result


def _video_numbers(names: list[str]) -> list[int]:
    """Places in the recorded frames of videos named .../vidK.mp4."""
    return [int(re.findall(r"\d+", Path(name).stem)[-1]) for name in names]


def _close_if_recorded(case: Case, result: Comparison, values: dict[str, torch.Tensor], prefix: str) -> None:
    for name, value in values.items():
        if prefix + name in case.expected:
            result.close(prefix + name, value, case.expected[prefix + name])


@torch.no_grad()
def compare_choices(folder: Path) -> Comparison:
    """Match scores of the options of multiple-choice questions, a frame and ensembled, and the options chosen."""
    case, result = Case(folder), Comparison(folder.name)
    model = case.load()
    assert isinstance(model, Singularity)
    ids, mask = case.expected["option_input_ids"], case.expected["option_attention_mask"]
    questions, options = ids.shape[:2]
    mask = mask.flatten(0, 1)
    states, _ = model.encode_text(ids.flatten(0, 1), mask)
    own = torch.eye(questions, dtype=torch.bool).repeat_interleave(options, dim=1)  # a question's options: its visual's
    for mode in json.loads((folder / "case.json").read_text()).get("modes", ENSEMBLES):
        tokens, _ = model.encode_clips(case.inputs["frames"], mode, skip_temporal=True)
        scores = match_scores(model, states, mask, tokens, own, mode)[own].view(questions, options)
        result.close(f"{mode}_scores", scores, case.expected[f"{mode}_scores"])
        result.equal(f"{mode}_pred", scores.argmax(1), case.expected[f"{mode}_pred"])
        if f"{mode}_frame_scores" in case.expected:
            frames = torch.stack(
                [match_scores(model, states, mask, tokens[:, t : t + 1], own)[own] for t in range(tokens.shape[1])]
            ).view(-1, questions, options)
            result.close(f"{mode}_frame_scores", frames.transpose(0, 1), case.expected[f"{mode}_frame_scores"])
            chosen = frames.argmax(2).T
            result.equal(f"{mode}_frame_pred", chosen, case.expected[f"{mode}_frame_pred"])
    return result


def compare_answers(folder: Path) -> Comparison:
    """Training loss and gradients of the answer decoder, and the ranking of candidate answers in all ensembles."""
    case, result = Case(folder), Comparison(folder.name)
    model = case.load()
    assert isinstance(model, SingularityQA)
    _compare_answer_training(model, case, result)
    compare_gradients(model, folder / "grads.npz", result)
    with torch.no_grad():
        _compare_answer_ranking(model, case, result)
    return result


def _compare_answer_training(model: SingularityQA, case: Case, result: Comparison) -> None:
    recorded = {
        name.removeprefix("train_"): value for name, value in case.expected.items() if name.startswith("train_")
    }
    questions = recorded["question_ids"], recorded["question_mask"]
    answers = recorded["answer_ids"], recorded["answer_mask"]
    loss = model(case.inputs["train_image"], *questions, *answers, recorded["weights"], recorded["n"])["loss_qa"]
    loss.backward()
    result.loss("train_loss", loss, recorded["loss"])
    with torch.no_grad():
        states = model.frame_states(model.encode_clips(case.inputs["train_image"])[0], *questions)[0]
        owner = torch.arange(len(states)).repeat_interleave(recorded["n"])
        logits = model.answer_decoder(*answers, model.answer_decoder.project(states), questions[1], owner)
    result.close("train_question_states", states, recorded["question_states"])
    result.close("train_answer_logits", logits, recorded["answer_logits"])
    result.close("train_answer_loss", answer_losses(logits, answers[0], model.pad_id), recorded["answer_loss"])


def _compare_answer_ranking(model: SingularityQA, case: Case, result: Comparison) -> None:
    settings = json.loads((case.folder / "case.json").read_text())
    expected, frames = case.expected, case.inputs["eval_frames"]
    questions = _eval_questions(case)
    answers = expected["answer_list_ids"], expected["answer_list_mask"]
    for mode in settings.get("modes", ENSEMBLES):
        states = model.frame_states(model.encode_clips(frames, mode, skip_temporal=True)[0], *questions)
        keys = [model.answer_decoder.project(each) for each in states]
        opening = model.first_token_probabilities(keys, questions[1], int(answers[0][0, 0]), mode)
        result.close(f"{mode}_first_token_probs", opening[:, answers[0][:, 1]], expected[f"{mode}_first_token_probs"])
        ids, probabilities = model.rank_answers(states, questions[1], *answers, settings["k_test"], mode)
        result.close(f"{mode}_topk_probs", probabilities, expected[f"{mode}_topk_probs"])
        result.equal(f"{mode}_topk_ids", ids, expected[f"{mode}_topk_ids"])


def _eval_questions(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of the questions of anno_eval.json, tokenised as BERT does it from the shared vocabulary."""
    questions = [item["question"] for item in json.loads((case.folder / "anno_eval.json").read_text())]
    length = case.expected["train_question_ids"].shape[1]
    return tokenise(questions, case.vocabulary, length)
