"""Accuracy of answers: exact match, and VQA's soft accuracy with the quirks of the official tool."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import lru_cache

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32  # at most, in one answer: the official tool passes a flag where a count belongs

# The official table of contractions: each form is restored where exactly one apostrophe was left out. It is not
# complete ("she'd", "we'd", and those with "I" are never restored), and published numbers depend on that.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:position] + form[position + 1 :]: form
    for form in CONTRACTED.split()
    for position, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


@dataclass(frozen=True)
class Annotated:
    """A question's human answers, as they were given, and its types."""

    answers: Sequence[str]
    question_type: str = ""
    answer_type: str = ""


@lru_cache(maxsize=1 << 16)  # answers repeat
def without_punctuation(text: str) -> str:
    """The official treatment of punctuation: removed beside a space or where a number has a comma, else a space."""
    result = text
    in_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or in_number else " ")
    return PERIOD.sub("", result, count=PERIODS_REMOVED)


def without_articles(text: str) -> str:
    """Lower case, number words up to ten as digits, no articles, apostrophes restored in contractions."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalized(answer: str) -> str:
    """A predicted answer as VQA compares it."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    return without_articles(without_punctuation(text))


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's accuracy in [0, 1]: an answer counts fully when three of the other annotators gave it.

    The mean over leaving out each annotator. As in the official tool the human answers lose their punctuation only
    where they differ, and their articles and number words never: a prediction of "two" can be wrong for "two".
    """
    return _soft_accuracy(normalized(prediction), _as_compared(answers))


def _as_compared(answers: Sequence[str]) -> list[str]:
    return [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def _soft_accuracy(given: str, human: Sequence[str]) -> float:
    matches = human.count(given)
    return sum(min(1.0, (matches - (answer == given)) / 3) for answer in human) / len(human)


def exact_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 for a prediction that is one of the answers, else 0."""
    return float(prediction in answers)


SCORES = {"exact": exact_accuracy, "vqa": soft_accuracy}


def accuracies(questions: Sequence[Annotated], predictions: Sequence[str | None], accuracy: str) -> list[float | None]:
    """Accuracy in [0, 1] of each question's prediction: 0 without one, None where the question is not annotated.

    accuracy: "exact" (match) or "vqa" (soft).
    """
    score = SCORES[accuracy]
    return [
        None if not question.answers else 0.0 if given is None else score(given, question.answers)
        for question, given in zip(questions, predictions, strict=True)
    ]


def accuracy_by_type(questions: Sequence[Annotated], values: Sequence[float | None]) -> dict[str, float]:
    """Percent, two decimals, over the annotated questions: "overall", and one entry a type as "answer_type/X" and
    "question_type/X"; nothing where no question is annotated.
    """
    groups: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        if value is None:
            continue
        groups.setdefault("overall", []).append(value)
        for kind, name in (("answer_type", question.answer_type), ("question_type", question.question_type)):
            if name:
                groups.setdefault(f"{kind}/{name}", []).append(value)
    return {name: round(100 * sum(values) / len(values), 2) for name, values in groups.items()}


@dataclass(frozen=True)
class AnswerBaselines:
    """Baselines that ignore the visual, in percent by type as in `accuracy_by_type`.

    chance: a random answer of the list for each question. constant: always `answer`, the one that is right most often
    on these questions.
    """

    chance: dict[str, float]
    answer: str
    constant: dict[str, float]


def answer_baselines(questions: Sequence[Annotated], answer_list: Sequence[str], accuracy: str) -> AnswerBaselines:
    """The baselines for questions answered with one of `answer_list`, at least one; accuracy as in `accuracies`."""
    forms = [normalized(answer) if accuracy == "vqa" else answer for answer in answer_list]
    times = Counter(forms)
    points = [_points(question.answers, times, accuracy) for question in questions]
    totals = dict.fromkeys(forms, 0.0)
    for each in points:
        for form, value in each.items():
            totals[form] += value
    best = max(totals, key=lambda form: totals[form])
    chance = [sum(times[form] * value for form, value in each.items()) / len(forms) for each in points]
    constant = [each.get(best, 0.0) for each in points]
    chance_by_type, constant_by_type = (
        accuracy_by_type(questions, [v if q.answers else None for q, v in zip(questions, values, strict=True)])
        for values in (chance, constant)
    )
    return AnswerBaselines(chance_by_type, answer_list[forms.index(best)], constant_by_type)


def _points(answers: Sequence[str], forms: Container[str], accuracy: str) -> dict[str, float]:
    """The accuracy of each candidate answer, where it is not 0."""
    if accuracy == "exact":
        return {answer: 1.0 for answer in answers if answer in forms}
    human = _as_compared(answers)
    return {form: _soft_accuracy(form, human) for form in dict.fromkeys(human) if form in forms}
