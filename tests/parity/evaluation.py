"""Parity of retrieval scores and metrics, answers and multiple choice (cases 05 to 07)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.cache import Block
from eval.config import EvalConfig
from eval.features import collect_visuals, encode_blocks, encode_texts
from eval.metrics import retrieval_metrics
from eval.tasks.answers import Annotated, accuracies, accuracy_by_type
from eval.tasks.multiple_choice import score_options
from eval.tasks.qa import rank_for_block
from eval.tasks.retrieval import Scores, score, score_matrices
from model.config import ENSEMBLES
from model.singularity import Singularity
from model.vqa import SingularityQA, answer_losses
from preprocessing.text import clean_text
from tests.parity.comparison import Case, Comparison, as_lists
from tests.parity.forward import compare_gradients

EVERYTHING = 10**9  # candidates
MATRICES = ("i2t_x", "t2i_x", "i2t_emb", "t2i_emb")


@torch.no_grad()
def compare_retrieval(folder: Path) -> Comparison:
    """Score matrices and metrics of both encoders: all ensembles and cuts, several texts or visuals."""
    case, result = Case(folder), Comparison(folder.name)
    settings, recorded = case.json("case.json"), case.json("expected.json")
    cuts = {"": settings["k_test"], "ksmall_": settings.get("k_small", 5), "full_": EVERYTHING}
    configs = {
        f"{cut}{mode}": EvalConfig(k_test=k, eval_frame_ensemble=mode, ensemble_skips_temporal=True)
        for cut, k in cuts.items()
        for mode in settings.get("modes", ENSEMBLES)
    }
    configs["xonly"] = EvalConfig(eval_x_only=True)
    model = case.load()
    for texts in ("", "multiimg_"):
        for name, config in configs.items():
            if any(f"{texts}{name}_{matrix}" in case.expected for matrix in MATRICES):
                _compare_scores(model, case, result, config, recorded, texts, f"{texts}{name}")
    return result


def _compare_scores(
    model: Singularity, case: Case, result: Comparison, config: EvalConfig, recorded: Any, texts: str, name: str
) -> None:
    """One recorded evaluation `name` of the texts and visuals with prefix `texts`."""
    dataset = recorded[f"{texts}dataset"]
    numbers = [int(re.findall(r"\d+", Path(path).stem)[-1]) for path in dataset["image"]]  # of .../vidK.mp4
    batches = [(case.inputs["frames"][numbers], torch.arange(len(numbers)))]
    visuals = collect_visuals(model, encode_blocks(model, batches, config), len(numbers), config)
    ids, mask = (case.expected[f"{texts}text_{part}"] for part in ("input_ids", "attention_mask"))
    scores = score(model, visuals, encode_texts(model, ids, mask), config)
    assert scores is not None
    assert scores.visual_to_text is not None
    assert scores.text_to_visual is not None
    matrices = (scores.visual_to_text, scores.text_to_visual, scores.similarity, scores.similarity.T)
    for kind, matrix in zip(MATRICES, matrices, strict=True):
        if f"{name}_{kind}" in case.expected:
            result.close(f"{name}_{kind}", matrix, case.expected[f"{name}_{kind}"])
    if f"{name}_metrics" in recorded:
        _compare_metrics(scores, dataset, result, recorded[f"{name}_metrics"], name)


def _compare_metrics(scores: Scores, dataset: Any, result: Comparison, official: Any, name: str) -> None:
    """The metrics of one evaluation; where they depend on the order of equal scores, their bounds."""
    truth = as_lists(dataset["img2txt"]), as_lists(dataset["txt2img"])
    matched, dual = (retrieval_metrics(*pair, *truth) for pair in score_matrices(name, scores).values())
    found: dict[str, Any] = {"dual_encoder": dual.values, "depends_on_ties": bool(matched.depends_on_ties)}
    found |= {"cross_encoder_best_ties": matched.best, "cross_encoder_worst_ties": matched.worst}
    if not official.get("depends_on_ties"):
        found["cross_encoder"] = matched.values
    for key, value in found.items():
        if key in official:
            result.equal(f"{name}: {key}", value, official[key])


@torch.no_grad()
def compare_choices(folder: Path) -> Comparison:
    """Match scores of the options of multiple-choice questions, a frame and ensembled, and the options chosen."""
    case, result = Case(folder), Comparison(folder.name)
    model = case.load()
    ids, mask = case.expected["option_input_ids"], case.expected["option_attention_mask"].flatten(0, 1)
    questions, options = ids.shape[:2]
    texts = encode_texts(model, ids.flatten(0, 1), mask)
    items = [(question, list(range(options * question, options * (question + 1)))) for question in range(questions)]
    batches = [(case.inputs["frames"], torch.arange(questions))]
    recorded = case.json("expected.json")

    def scores(blocks: list[Block], config: EvalConfig) -> np.ndarray:
        visuals = collect_visuals(model, blocks, questions, config)
        return np.stack(score_options(model, visuals, texts, items, config))

    for mode in case.json("case.json").get("modes", ENSEMBLES):
        config = EvalConfig(eval_frame_ensemble=mode, ensemble_skips_temporal=True)
        blocks = list(encode_blocks(model, batches, config))
        found = scores(blocks, config)
        result.close(f"{mode}_scores", found, case.expected[f"{mode}_scores"])
        result.equal(f"{mode}_pred", found.argmax(1), case.expected[f"{mode}_pred"])
        accuracy = round(100 * float((found.argmax(1) == case.expected["answers"].numpy()).mean()), 2)
        result.equal(f"{mode}: accuracy", accuracy, recorded[mode]["test"])
        if f"{mode}_frame_scores" in case.expected:
            (block,) = blocks
            single = [replace(block, tokens=tokens[:, None]) for tokens in block.tokens.unbind(1)]
            frames = np.stack([scores([each], EvalConfig()) for each in single], 1)  # (Q, F, O)
            result.close(f"{mode}_frame_scores", frames, case.expected[f"{mode}_frame_scores"])
            result.equal(f"{mode}_frame_pred", frames.argmax(2), case.expected[f"{mode}_frame_pred"])
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
        states = model.frame_states(model.clip_tokens(case.inputs["train_image"])[0], *questions)[0]
        owner = torch.arange(len(states)).repeat_interleave(recorded["n"])
        logits = model.answer_decoder(*answers, model.answer_decoder.project(states), questions[1], owner)
    result.close("train_question_states", states, recorded["question_states"])
    result.close("train_answer_logits", logits, recorded["answer_logits"])
    result.close("train_answer_loss", answer_losses(logits, answers[0], model.pad_id), recorded["answer_loss"])


def _compare_answer_ranking(model: SingularityQA, case: Case, result: Comparison) -> None:
    """The answers ranked for each question, and their accuracy, in all ensembles."""
    settings, expected = case.json("case.json"), case.expected
    asked, answer_list = case.json("anno_eval.json"), case.json("answer_list.json")
    length = expected["train_question_ids"].shape[1]
    questions = case.tokenizer().encode([clean_text(item["question"]) for item in asked], length)
    answers = expected["answer_list_ids"], expected["answer_list_mask"]
    written = case.tokenizer().encode([f"{answer} [SEP]" for answer in answer_list], answers[0].shape[1])
    result.equal("answer_list_ids", written[0], answers[0])
    annotated = [Annotated([item["answer"]]) for item in asked]
    everyone = np.arange(len(asked))
    for mode in settings.get("modes", ENSEMBLES):
        config = EvalConfig(k_test=settings["k_test"], eval_frame_ensemble=mode, ensemble_skips_temporal=True)
        tokens, _ = model.clip_tokens(case.inputs["eval_frames"], mode, True)
        keys = [model.answer_decoder.project(each) for each in model.frame_states(tokens, *questions)]
        opening = model.first_token_probabilities(keys, questions[1], int(answers[0][0, 0]), mode)
        result.close(f"{mode}_first_token_probs", opening[:, answers[0][:, 1]], expected[f"{mode}_first_token_probs"])
        _, ids, probabilities = rank_for_block(model, Block(everyone, tokens), questions, everyone, answers, config)
        result.close(f"{mode}_topk_probs", probabilities, expected[f"{mode}_topk_probs"])
        result.equal(f"{mode}_topk_ids", ids, expected[f"{mode}_topk_ids"])
        recorded = case.json("expected.json")["modes"][mode]
        predictions = [answer_list[first] for first in ids[:, 0].tolist()]
        result.equal(f"{mode}: answers", predictions, [item["answer"] for item in recorded["predictions"]])
        accuracy = accuracy_by_type(annotated, accuracies(annotated, predictions, "exact"))
        result.equal(f"{mode}: accuracy", accuracy, recorded["accuracy"])
