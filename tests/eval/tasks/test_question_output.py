"""Files and pages of questions and multiple choice: submissions, types, what is missing, and published numbers."""

import json
import shutil
from dataclasses import replace

import pytest

from eval.config import EvalConfig
from eval.outputs import Subject, write_evaluation
from eval.report.evaluations import read_evaluation
from eval.report.page import write_report
from eval.report.tables import console_table
from eval.tasks.multiple_choice import MultipleChoiceTask
from eval.tasks.qa import QATask
from loaders.config import LoaderConfig, PerMedia
from loaders.evaluation import ChoiceSet, QASet
from model.vqa import SingularityQA
from tests.eval.small import small_model
from tests.eval.test_eval_shards import damage

LOADER = LoaderConfig(image_res=32, max_txt_l=PerMedia(32, 32))
ANSWERS = ["red", "blue", "2", "3", "circle", "<b>left</b>"]


def typed(dataset):
    """The questions with types, the last one without annotations, as a benchmark's hidden test set has them."""
    kinds = ("yes/no", "number", "other")
    dataset.questions = [
        replace(q, question_type=f"kind {i % 2}", answer_type=kinds[i % 3]) for i, q in enumerate(dataset.questions)
    ]
    dataset.questions[-1] = replace(dataset.questions[-1], answers=(), weights=())
    return dataset


@pytest.fixture(scope="module")
def damaged(shapes, tmp_path_factory):
    """Test sets of which the third clip cannot be read."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("qa_test", "mc_test"):
        shutil.copytree(shapes.url(name), folder / name)
        damage(str(folder / name), 2)
    return folder


@pytest.fixture(scope="module")
def folder(damaged, tokenizer, tmp_path_factory):
    """An evaluation of questions and one of multiple choice, with one frame: the damaged one is not passed by."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = EvalConfig(task="qa", k_test=4, gallery=4, accuracy="vqa", benchmark="vqa")
    loader = LoaderConfig(image_res=32)
    loader.video_input.sample_type_test = "fps4"  # begins with the first frame
    questions = typed(QASet(str(damaged / "qa_test"), loader))
    questions.name = "test_std"
    answered = QATask(ANSWERS).evaluate(small_model(tokenizer, SingularityQA), questions, tokenizer, config, 8)
    output = QATask(ANSWERS).output(answered, questions, config)
    write_evaluation(run / "evaluation" / "qa", [output], config, Subject(checkpoint="weights"))
    config = EvalConfig(task="choice", gallery=4, benchmark="msrvtt_mc")
    choices = ChoiceSet(str(damaged / "mc_test"), loader)
    choices.name = "test"
    chosen = MultipleChoiceTask().evaluate(small_model(tokenizer), choices, tokenizer, config, 8)
    write_evaluation(run / "evaluation" / "mc", [MultipleChoiceTask().output(chosen, choices, config)], config)
    return run


def test_submissions_hold_every_question_in_order(folder, shapes):
    questions = QASet(shapes.url("qa_test"), LOADER).questions
    submitted = json.loads((folder / "evaluation/qa/submission/test_std.json").read_text())
    assert [str(item["question_id"]) for item in submitted] == [q.question_id for q in questions]
    assert all(set(item) == {"question_id", "answer"} for item in submitted)
    unread = [i for i, q in enumerate(questions) if q.visual == 2]
    assert [i for i, item in enumerate(submitted) if item["answer"] == ""] == unread
    assert unread
    choices = ChoiceSet(shapes.url("mc_test"), LOADER).choices
    submitted = json.loads((folder / "evaluation/mc/submission/test.json").read_text())
    assert [str(item["question_id"]) for item in submitted] == [c.question_id for c in choices]
    assert all(item["answer"] in range(-1, 5) for item in submitted)


def test_missing_predictions_count_as_wrong_and_are_told(folder):
    for label, split in (("qa", "test_std"), ("mc", "test")):
        evaluation = read_evaluation(folder / "evaluation" / label)
        details = evaluation.details["splits"][split]
        assert len(details["missing"]) == 1
        assert details["num_unanswered"] >= 1
        items = json.loads((evaluation.folder / "predictions.json").read_text())[split]
        known = [item["accuracy"] for item in items if item["accuracy"] is not None]
        assert evaluation.metrics[split]["overall"] == round(100 * sum(known) / len(known), 2)
        assert all(item["accuracy"] == 0 for item in items if item["answer"] is None)
        page = (evaluation.folder / "report.html").read_text()
        assert "1 of 24 clips could not be read" in page
        assert next(iter(details["missing"])) in page
    details = read_evaluation(folder / "evaluation/qa").details["splits"]["test_std"]
    assert details["num_annotated"] == details["num_questions"] - 1


def test_a_broken_sample_moves_no_other_answer(folder, shapes, tokenizer):
    loader = LoaderConfig(image_res=32)
    loader.video_input.sample_type_test = "fps4"
    config = EvalConfig(task="qa", k_test=4, accuracy="vqa")
    whole = typed(QASet(shapes.url("qa_test"), loader))
    result = QATask(ANSWERS).evaluate(small_model(tokenizer, SingularityQA), whole, tokenizer, config, 8)
    items = json.loads((folder / "evaluation/qa/predictions.json").read_text())["test_std"]
    others = [(item["answer"], result.predictions[i]) for i, item in enumerate(items) if item["answer"] is not None]
    assert len(others) < len(items)
    assert all(first == second for first, second in others)


def test_the_page_has_types_published_numbers_and_examples(folder, visitor, tmp_path):
    path = write_report([folder], tmp_path / "report.html")
    page = visitor.page
    page.goto(path.as_uri())
    text = page.text_content("main")  # also what a narrow window shows otherwise
    for part in (
        "yes/no", "number", "Singularity 17M, fine-tuned", "73.3", "93.7", "as published", "VQA soft accuracy",
        "the most frequent answer of this test set, for every question", "; ×: multiple of it", "choosing at random",
    ):  # fmt: skip
        assert part in text
    page.click("text=By type of question")
    assert "kind 1" in page.inner_text("main")
    (kind,) = [row for row in page.locator("details.types tr").all_inner_texts() if "kind 1" in row]
    low, high = read_evaluation(folder / "evaluation/qa").details["intervals"]["test_std"]["question_type/kind 1"]
    assert f"{low:.1f}–{high:.1f}" in kind
    for number in range(2):
        page.select_option("#set", str(number))
        assert page.is_hidden("button[value=text_to_visual]")
        page.click("button[value=random]")
        shown, of = visitor.pictures()
        assert shown == of >= 3
        assert page.locator(".panel:visible .answers li").count() >= 12
    assert visitor.errors == []
    assert visitor.sticks_out() <= 0
    assert "<b>left</b>" not in path.read_text()


def test_the_console_shows_accuracies(folder):
    text = console_table([read_evaluation(folder / "evaluation/qa"), read_evaluation(folder / "evaluation/mc")])
    assert "yes/no" in text
    assert "kind 1" not in text
    assert "chance test" in text
    assert "chance test_std" in text
    always = read_evaluation(folder / "evaluation/qa").details["splits"]["test_std"]["constant"]
    (row,) = [line for line in text.splitlines() if line.startswith(f"always “{always['answer']}” test_std")]
    assert f"{always['values']['overall']:.2f}" in row
