"""Answers and multiple choice: on packed Shapes by the real loader."""

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from eval.config import EvalConfig
from eval.tasks.multiple_choice import MultipleChoiceTask
from eval.tasks.qa import QATask, annotator_answers
from loaders.config import LoaderConfig, PerMedia
from loaders.evaluation import ChoiceSet, QASet, Question
from model.vqa import SingularityQA
from tests.eval.small import small_model

LOADER = LoaderConfig(image_res=32, max_txt_l=PerMedia(32, 32))


@pytest.mark.parametrize("ensemble", ["concat", "lse"])
def test_answers_do_not_depend_on_batches(shapes, tokenizer, ensemble):
    model = small_model(tokenizer, SingularityQA)
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
    model = small_model(tokenizer)
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
    model = small_model(tokenizer, SingularityQA)
    result = QATask(["red", "blue", "2"]).evaluate(model, dataset, tokenizer, EvalConfig(k_test=2), 1)
    unanswered = [number for number, item in enumerate(dataset.questions) if item.visual == 0]
    assert unanswered == [number for number, given in enumerate(result.predictions) if given is None]
    assert unanswered
    assert all(result.accuracies[number] == 0 for number in unanswered)
    assert result.missing == {0: "truncated JPEG"}


def test_bad_settings_and_weights_that_are_not_finite_are_errors(shapes, tokenizer):
    questions, choices = QASet(shapes.url("qa_test"), LOADER), ChoiceSet(shapes.url("mc_test"), LOADER)
    answering, matching = small_model(tokenizer, SingularityQA), small_model(tokenizer)
    with pytest.raises(ValueError, match="answer list is empty"):
        QATask([])
    with pytest.raises(ValueError, match="k_test is 0"):
        QATask(["red"]).evaluate(answering, questions, tokenizer, EvalConfig(k_test=0), 1)
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
        QATask(["red", "2"]).evaluate(small_model(tokenizer, SingularityQA), questions, tokenizer, config, 1)
        MultipleChoiceTask().evaluate(
            small_model(tokenizer), ChoiceSet(shapes.url("mc_test"), LOADER), tokenizer, config, 1
        )
        shown.append(sys.stderr.getvalue())
    assert ["encoding" in text for text in shown] == [True, False]
    assert all("answering qa_test" in text and "matching" in text for text in shown)


def test_annotators_come_back_from_shares():
    def answers(*shares):
        names = tuple("abcdefghij"[: len(shares)])
        return annotator_answers(Question(0, "1", "?", names, shares, "", "")).answers

    assert answers(0.8, 0.2) == ["a"] * 8 + ["b"] * 2
    assert answers(1.0) == ["a"] * 10
    assert answers(np.float32(1 / 3), np.float32(2 / 3)) == ["a", "b", "b"]
