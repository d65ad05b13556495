"""Accuracy of answers: what users rely on, and the official tool's recorded cases."""

import pytest

from eval.tasks.answers import (
    Annotated,
    accuracies,
    accuracy_by_type,
    answer_baselines,
    normalized,
    soft_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog.", "dog"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("left-hand side", "left hand side"),
        ("three dogs, two cats", "3 dogs 2 cats"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yalld've", "yalld've"),
        ("twas", "'twas"),
        ("." * 40, "." * 8),
    ],
)
def test_answers_are_normalized_as_the_official_tool_does(answer, expected):
    assert normalized(answer) == expected


def test_soft_accuracy():
    assert soft_accuracy("red", ["red"] * 10) == 1
    assert soft_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert soft_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(9 / 3 / 10)
    assert soft_accuracy("red", ["blue"] * 10) == 0
    assert soft_accuracy("two", ["two"] * 10) == 0  # the official tool turns only the prediction into 2


def table_of(questions, predictions, accuracy):
    return accuracy_by_type(questions, accuracies(questions, predictions, accuracy))


def test_questions_without_a_prediction_count_as_wrong_and_those_without_annotations_not_at_all():
    questions = [
        Annotated(["red"] * 10, "what color", "other"),
        Annotated(["yes"] * 10, "is the", "yes/no"),
        Annotated([], "is the", "yes/no"),
    ]
    assert accuracies(questions, ["red", None, "no"], "vqa") == [1.0, 0.0, None]
    assert table_of(questions, ["red", None, "no"], "vqa") == {
        "overall": 50.0,
        "answer_type/other": 100.0,
        "question_type/what color": 100.0,
        "answer_type/yes/no": 0.0,
        "question_type/is the": 0.0,
    }
    assert table_of(questions, [None, "yes", None], "exact")["overall"] == 50.0
    assert table_of(questions[2:], ["no"], "vqa") == {}


@pytest.mark.parametrize("accuracy", ["exact", "vqa"])
def test_baselines_are_those_of_every_answer_of_the_list_in_turn(accuracy):
    listed = ["yes", "no", "Two", "2", "a red", "red", "blue", "never asked"]
    questions = [
        Annotated(["yes"] * 7 + ["no"] * 3, "is the", "yes/no"),
        Annotated(["no"] * 10, "is the", "yes/no"),
        Annotated(["red"] * 4 + ["re-d"] + ["no"] * 5, "what color", "other"),
        Annotated(["2"] * 9 + ["two, three"], "how many", "number"),
        Annotated(["not in the list"] * 10, "what", "other"),
        Annotated([], "what", "other"),
    ]
    each = [accuracies(questions, [answer] * len(questions), accuracy) for answer in listed]
    expected = [None if values[0] is None else sum(values) / len(listed) for values in zip(*each)]
    baselines = answer_baselines(questions, listed, accuracy)
    assert baselines.chance == accuracy_by_type(questions, expected)
    assert baselines.answer == "no"
    assert baselines.constant == accuracy_by_type(questions, each[1])
    assert baselines.constant["overall"] == max(accuracy_by_type(questions, values)["overall"] for values in each)


def test_of_equally_frequent_answers_the_earlier_of_the_list_is_the_baseline():
    questions = [Annotated(["red"]), Annotated(["blue"])]
    assert answer_baselines(questions, ["green", "blue", "red"], "exact").answer == "blue"
    assert answer_baselines([Annotated([])], ["green", "blue"], "exact").chance == {}
