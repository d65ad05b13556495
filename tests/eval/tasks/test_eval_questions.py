"""Answers and multiple choice: on packed Shapes by the real loader, and the official cases."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import SHARED

from eval.cache import Block
from eval.config import EvalConfig
from eval.features import collect_visuals, encode_blocks, encode_texts
from eval.tasks.answers import Annotated, accuracies, accuracy_by_type
from eval.tasks.multiple_choice import MultipleChoiceTask, score_options
from eval.tasks.qa import QATask, annotated_by, rank_for_block
from loaders.config import LoaderConfig, PerMedia
from loaders.evaluation import ChoiceSet, QASet, Question
from loaders.text import Tokenizer, clean_text
from model.checkpoints.loading import load_model
from model.config import ModelConfig, TextConfig, VisionConfig
from model.singularity import Singularity
from model.vqa import SingularityQA

GOLDEN = SHARED / "golden"
MODES = ["concat", "mean", "max", "lse"]
LOADER = LoaderConfig(image_res=32, max_txt_l=PerMedia(32, 32))


def model_for(kind, tokenizer):
    torch.manual_seed(0)
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=4, fusion_layer=2, heads=2, intermediate=64, max_positions=40
    )
    vision = VisionConfig(patch_size=8, width=32, depth=2, heads=2)
    config = ModelConfig(vision_encoder=vision, text_encoder=text, image_res=32, embed_dim=16)
    return kind(config, tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id).eval()


@pytest.mark.parametrize("ensemble", ["concat", "lse"])
def test_answers_do_not_depend_on_batches(shapes, tokenizer, ensemble):
    model = model_for(SingularityQA, tokenizer)
    answers = json.loads((shapes.folder / "answer_list.json").read_text())
    config = EvalConfig(k_test=6, eval_frame_ensemble=ensemble)
    results = []
    for batch_size in (3, 50):
        dataset = QASet(shapes.url("qa_test"), LOADER)
        changed = replace(config, batch_size_test=PerMedia(batch_size, batch_size))
        results.append(QATask(answers).evaluate(model, dataset, tokenizer, changed, 2))
    first, second = results
    assert first.metrics == second.metrics
    assert first.predictions == second.predictions
    np.testing.assert_allclose(first.probabilities, second.probabilities, atol=1e-5)
    assert first.answers.shape == (len(dataset.questions), 6)
    assert (np.diff(first.probabilities) <= 0).all()
    assert len(first.predictions) == len(first.accuracies) == len(dataset.questions)
    assert set(first.predictions) <= set(answers)
    assert "overall" in first.metrics["qa_test"]


def test_choices_do_not_depend_on_batches_and_equal_single_pairs(shapes, tokenizer):
    model = model_for(Singularity, tokenizer)
    config = EvalConfig(batch_size_test=PerMedia(5, 5), pair_batch_size=16)
    dataset = ChoiceSet(shapes.url("mc_test"), LOADER)
    first = MultipleChoiceTask().evaluate(model, dataset, tokenizer, config, 2)
    second = MultipleChoiceTask().evaluate(model, dataset, tokenizer, EvalConfig(), 2)
    assert first.chosen == second.chosen
    assert first.metrics == second.metrics
    assert len(first.chosen) == len(dataset.choices)
    correct = sum(one == choice.answer for one, choice in zip(first.chosen, dataset.choices))
    assert first.metrics["mc_test"]["overall"] == round(100 * correct / len(dataset.choices), 2)
    assert all(len(row) == len(choice.options) for row, choice in zip(first.scores, dataset.choices))


def test_questions_about_unreadable_clips_count_as_wrong(shapes, tokenizer):
    class OneUnreadable(QASet):
        def batches(self, *args, **kwargs):
            self.missing[0] = "truncated JPEG"
            for batch in super().batches(*args, **kwargs):
                keep = batch.indices != 0
                yield replace(batch, frames=batch.frames[keep], indices=batch.indices[keep])

    dataset = OneUnreadable(shapes.url("qa_test"), LOADER)
    model = model_for(SingularityQA, tokenizer)
    result = QATask(["red", "blue", "2"]).evaluate(model, dataset, tokenizer, EvalConfig(k_test=2), 1)
    unanswered = [number for number, item in enumerate(dataset.questions) if item.visual == 0]
    assert unanswered == [number for number, given in enumerate(result.predictions) if given is None]
    assert unanswered
    assert all(result.accuracies[number] == 0 for number in unanswered)
    assert result.missing == {0: "truncated JPEG"}


def test_bad_settings_are_refused(shapes, tokenizer):
    dataset, model = QASet(shapes.url("qa_test"), LOADER), model_for(SingularityQA, tokenizer)
    with pytest.raises(ValueError, match="answer list is empty"):
        QATask([]).evaluate(model, dataset, tokenizer, EvalConfig(), 1)
    with pytest.raises(ValueError, match="k_test is 0"):
        QATask(["red"]).evaluate(model, dataset, tokenizer, EvalConfig(k_test=0), 1)


def test_weights_that_are_not_finite_are_an_error_not_a_result(shapes, tokenizer):
    questions, choices = QASet(shapes.url("qa_test"), LOADER), ChoiceSet(shapes.url("mc_test"), LOADER)
    answering, matching = model_for(SingularityQA, tokenizer), model_for(Singularity, tokenizer)
    for model in (answering, matching):
        next(model.vision_encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores hold NaN"):
        QATask(["red", "blue"]).evaluate(answering, questions, tokenizer, EvalConfig(), 1)
    with pytest.raises(ValueError, match="scores hold NaN"):
        MultipleChoiceTask().evaluate(matching, choices, tokenizer, EvalConfig(), 1)


def test_visuals_from_disk_show_progress_as_well(shapes, tokenizer, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    config = EvalConfig(k_test=2, feature_cache=str(tmp_path))
    shown = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stderr", Terminal())
        questions = QASet(shapes.url("qa_test"), LOADER)
        QATask(["red", "2"]).evaluate(model_for(SingularityQA, tokenizer), questions, tokenizer, config, 1)
        MultipleChoiceTask().evaluate(
            model_for(Singularity, tokenizer), ChoiceSet(shapes.url("mc_test"), LOADER), tokenizer, config, 1
        )
        shown.append(sys.stderr.getvalue())
    assert ["encoding" in text for text in shown] == [True, False]
    assert all("answering qa_test" in text and "matching" in text for text in shown)


def test_annotators_come_back_from_shares():
    def answers(*shares):
        names = tuple("abcdefghij"[: len(shares)])
        return annotated_by(Question(0, "1", "?", names, shares, "", "")).answers

    assert answers(0.8, 0.2) == ["a"] * 8 + ["b"] * 2
    assert answers(1.0) == ["a"] * 10
    assert answers(np.float32(1 / 3), np.float32(2 / 3)) == ["a", "b", "b"]


@pytest.mark.shared
@pytest.mark.parametrize("mode", MODES if GOLDEN.is_dir() else [])
def test_official_answers(mode):
    folder = GOLDEN / "06_vqa_beit"
    model, expected = load_model(folder / "ckpt.pth"), np.load(folder / "expected.npz")
    items = json.loads((folder / "anno_eval.json").read_text())
    answers = json.loads((folder / "answer_list.json").read_text())
    recorded = json.loads((folder / "expected.json").read_text())["modes"][mode]
    tokenizer = Tokenizer.load(str(GOLDEN / "vocab.txt"))
    questions = tokenizer.encode(
        [clean_text(item["question"]) for item in items], expected["train_question_ids"].shape[1]
    )
    candidates = tokenizer.encode([f"{answer} [SEP]" for answer in answers], expected["answer_list_ids"].shape[1])
    np.testing.assert_array_equal(candidates[0].numpy(), expected["answer_list_ids"])
    frames = torch.from_numpy(np.load(folder / "inputs.npz")["eval_frames"])
    config = EvalConfig(k_test=recorded["k_test"], eval_frame_ensemble=mode)
    everyone = np.arange(len(items))
    with torch.inference_mode():
        block = Block(everyone, model.encode_clips(frames, config.eval_frame_ensemble)[0])
        _, best, probability = rank_for_block(model, block, questions, everyone, candidates, config)
    np.testing.assert_array_equal(best.numpy(), expected[f"{mode}_topk_ids"])
    np.testing.assert_allclose(probability.numpy(), expected[f"{mode}_topk_probs"], rtol=1e-4, atol=2e-4)
    predictions = [answers[first] for first in best[:, 0].tolist()]
    assert predictions == [p["answer"] for p in recorded["predictions"]]
    annotated = [Annotated([item["answer"]]) for item in items]
    assert accuracy_by_type(annotated, accuracies(annotated, predictions, "exact")) == recorded["accuracy"]


@pytest.mark.shared
@pytest.mark.parametrize("mode", MODES if GOLDEN.is_dir() else [])
def test_official_choices(mode):
    folder = GOLDEN / "07_mc"
    model, expected = load_model(folder / "ckpt.pth"), np.load(folder / "expected.npz")
    frames = torch.from_numpy(np.load(folder / "inputs.npz")["frames"])
    ids, mask = (torch.from_numpy(expected[f"option_{name}"]).flatten(0, 1) for name in ("input_ids", "attention_mask"))
    items = [(visual, list(range(5 * visual, 5 * visual + 5))) for visual in range(len(frames))]
    config = EvalConfig(eval_frame_ensemble=mode)
    with torch.inference_mode():
        blocks = encode_blocks(model, [(frames, torch.arange(len(frames)))], config)
        visuals = collect_visuals(model, blocks, len(frames), config)
        scores = np.stack(score_options(model, visuals, encode_texts(model, ids, mask), items, config))
    np.testing.assert_allclose(scores, expected[f"{mode}_scores"], rtol=1e-4, atol=2e-4)
    np.testing.assert_array_equal(scores.argmax(1), expected[f"{mode}_pred"])
    official = json.loads((folder / "expected.json").read_text())[mode]["test"]
    assert round(100 * (scores.argmax(1) == expected["answers"]).mean(), 2) == official
