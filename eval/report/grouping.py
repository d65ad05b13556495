"""Groups evaluations by test set, which is identified by its items, not by its name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.evaluations import Evaluation, read_evaluation

WHILE_TRAINING = re.compile(r"epoch_\d+|final")  # labels


@dataclass(frozen=True)
class Member:
    """An evaluation of a test set: its number among all, and its name of the set."""

    number: int
    evaluation: Evaluation
    split: str

    @property
    def details(self) -> dict[str, Any]:
        """The entry of the test set in evaluation.json."""
        return self.evaluation.details["splits"][self.split]


@dataclass(frozen=True)
class TestSet:
    """The evaluations of one test set, at least one.

    name: as in the evaluations. distinction: how it differs from others of that name, empty where there are none.
    """

    name: str
    distinction: str
    members: Sequence[Member]

    __test__ = False  # pytest: no class of tests

    @property
    def title(self) -> str:
        """The name in reports, which no other test set has."""
        return f"{self.name} ({self.distinction})" if self.distinction else self.name

    @property
    def details(self) -> dict[str, Any]:
        """The details of its first evaluation; sizes and chance level are the same in all."""
        return self.members[0].details

    @property
    def packings(self) -> list[str]:
        """The packed corpus of each evaluation, where they differ; else empty texts."""
        corpora = [member.details.get("corpus") for member in self.members]
        if len({corpus["sha256"] for corpus in corpora if corpus}) < 2:
            return [""] * len(corpora)
        return [f"{corpus['url']} ({corpus['sha256'][:8]})" if corpus else "" for corpus in corpora]


def items_digest(predictions: Any) -> str:
    """A digest of the items that predictions are for: the media's names, texts, questions, options and truth.

    predictions: of one test set, as in predictions.json. The order of items and the
    predictions themselves do not matter.
    """
    lines = sorted(item_key(item) for item in _items(predictions))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _items(predictions: Any) -> Iterable[dict[str, Any]]:
    if isinstance(predictions, list):
        return predictions
    return (item for queries in predictions.values() for item in queries)


def item_key(item: dict[str, Any]) -> str:
    """A text that identifies an item, from its entry in predictions.json."""
    names = ("text", "visual", "source", "question_id", "question", "question_type", "answer_type")
    correct = sorted(json.dumps(one, sort_keys=True) for one in item["correct"])
    return json.dumps([*(item.get(name) for name in names), correct, sorted(item.get("options", []))])


def recorded_digest(evaluation: Evaluation, split: str) -> str:
    """The digest of a split's items; for older evaluations, computed from their predictions."""
    details = evaluation.details["splits"][split]
    if "items_sha256" in details:
        return details["items_sha256"]
    try:
        return items_digest(read_predictions(evaluation, split))
    except (OSError, ValueError, KeyError, TypeError):
        sizes = [details.get(key) for key in ("num_visuals", "num_texts", "num_questions", "media_type", "chance")]
        return json.dumps([split, *sizes])


def read_predictions(evaluation: Evaluation, split: str) -> Any:
    """The content of predictions.json for a split. Raises OSError, ValueError or KeyError where it cannot be read."""
    predictions = json.loads((evaluation.folder / "predictions.json").read_text(encoding="utf-8"))[split]
    if evaluation.details["splits"][split]["task"] == "choice":
        for item in predictions:
            item.setdefault("options", [option["text"] for option in item["top"]])
    return predictions


def ambiguous_splits(runs: Iterable[Path]) -> set[str]:
    """Names that mean different test sets in the runs' evaluations while training; unreadable ones are left out."""
    digests: dict[str, set[str]] = {}
    for folder in (folder for run in runs for folder in run.glob("evaluation/*/")):
        if not WHILE_TRAINING.fullmatch(folder.name):
            continue
        try:
            evaluation = read_evaluation(folder)
        except ValueError:
            continue
        for split in evaluation.details["splits"]:
            digests.setdefault(split, set()).add(recorded_digest(evaluation, split))
    return {split for split, found in digests.items() if len(found) > 1}


def group_test_sets(evaluations: Sequence[Evaluation]) -> list[TestSet]:
    """The test sets of all evaluations, in order; those of one name get a distinction."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for number, evaluation in enumerate(evaluations):
        for split, details in evaluation.details["splits"].items():
            # Accuracies of another kind, or chosen among more answers, have another level of chance.
            protocol = (details["task"], details.get("accuracy"), details.get("num_answers"))
            key = (*protocol, recorded_digest(evaluation, split))
            groups.setdefault(key, []).append(Member(number, evaluation, split))
    found = []
    for members in groups.values():
        namesakes = [other for other in groups.values() if _names(other) & _names(members)]
        name = ", ".join(dict.fromkeys(member.split for member in members))
        found.append(TestSet(name, _distinction(members, namesakes) if len(namesakes) > 1 else "", members))
    return found


def _names(members: Sequence[Member]) -> set[str]:
    return {member.split for member in members}


def _distinction(members: Sequence[Member], namesakes: Sequence[Sequence[Member]]) -> str:
    """The first of some facts that no two of the test sets of a name share."""
    facts: list[Callable[[Sequence[Member]], str]] = [_corpora, _sizes, _protocol, _evaluations]
    for fact in facts:
        known = [fact(each) for each in namesakes]
        if all(known) and len(set(known)) == len(known):
            return fact(members)
    return _evaluations(members)


def _corpora(members: Sequence[Member]) -> str:
    urls = (member.details.get("corpus", {}).get("url", "") for member in members)
    return ", ".join(dict.fromkeys(url for url in urls if url))


def _sizes(members: Sequence[Member]) -> str:
    details = members[0].details
    what = "clips" if details["media_type"] == "video" else "images"
    kind = "texts" if details["task"] == "retrieval" else "questions"
    texts = f", {details[f'num_{kind}']:,} {kind}" if f"num_{kind}" in details else ""
    return f"{details['num_visuals']:,} {what}{texts}"


def _protocol(members: Sequence[Member]) -> str:
    details = members[0].details
    return f"{details['protocol']}, {details['accuracy']}" if "protocol" in details else details["task"]


def _evaluations(members: Sequence[Member]) -> str:
    return ", ".join(dict.fromkeys(member.evaluation.title for member in members))
