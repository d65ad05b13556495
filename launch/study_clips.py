"""The ends of a study on real clips (launch/study_clips.sh): the annotations to pack, the table of the results."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.metrics import chance_metrics, true_ranks
from eval.outcomes import read_outcomes
from runtime.charts import grouped_bars, png
from runtime.errors import MissingError, UserError, command
from storage.files import write_text

ALL, KINDS = "all", ("appearance", "motion")
MODELS = {
    "given": "as given",
    "single": "tuned on 1 frame",
    "temporal": "tuned on 4 frames, temporal encoder",
    "single_qa": "questions, tuned on 1 frame",
    "temporal_qa": "questions, tuned on 4 frames, temporal encoder",
}
SHOWN = {"1_frame": "1 frame", "4_frames": "4 frames", "shuffled": "4 frames, other order"}
ANSWERED = {"overall": ALL, **{f"question_type/{kind}": kind for kind in KINDS}}
Z = 1.96


@dataclass
class AnnotatedClip:
    """A clip's captions and questions, as rows of Singularity's own JSON without the clip."""

    path: Path
    trains: bool = False
    captions: list[dict[str, Any]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)


def annotated_clips(folders: Iterable[Path]) -> list[AnnotatedClip]:
    """The clips that JSON lists in the folders describe; those of a list with "train" in its name are for fine-tuning.

    Raises UserError where a clip is missing, several may be meant, or none has a caption.
    """
    clips: dict[Path, AnnotatedClip] = {}
    for folder in folders:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for file in sorted(folder.glob("*.json")):
            for row in _listed(file):
                name = isinstance(row, dict) and (row.get("video") or row.get("image"))
                if not name:  # of another kind, such as a list of answers
                    continue
                path = _find_clip(name, files, file, folder)
                clip = clips.setdefault(path, AnnotatedClip(path))
                clip.trains |= "train" in file.name
                clip.captions += [{"caption": row["caption"]}] if "caption" in row else []
                if "question" in row:
                    if "answer" not in row:
                        raise UserError(f"{file}: a question about {name} has no answer: add one, or remove the row")
                    number = row.get("question_id", f"{path.name}#{len(clip.questions)}")
                    answer = {"question": row["question"], "answer": row["answer"], "question_id": str(number)}
                    clip.questions.append(answer)
    found = [clip for clip in clips.values() if clip.captions]
    if not found:
        raise UserError(f'{", ".join(map(str, folders))}: no JSON list of {{"video": file, "caption": text}}')
    return found


def _listed(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): mend it, or move it out of the folder") from None
    return rows if isinstance(rows, list) else []


def _find_clip(name: str, files: Sequence[Path], file: Path, folder: Path) -> Path:
    """The file whose path ends with `name`, else the one of its last part: annotations often hold other folders."""
    for ending in (Path(name).parts, Path(name).parts[-1:]):
        found = [path for path in files if path.parts[-len(ending) :] == ending]
        if len(found) > 1:
            raise UserError(f"{file}: {name} may be {found[0]} or {found[1]}: give the path below {folder}")
        if found:
            return found[0].resolve()
    raise MissingError(f"{file}: {name} is not below {folder}: put the clip there, or remove its rows")


def write_annotations(folders: Sequence[Path], motion: str, output: Path) -> None:
    """Write what is to be packed: every.json; held_out.json and train.json where some clips are for fine-tuning.

    motion: patterns, with spaces between them, of the names of clips and of question ids that only motion tells apart.
    """
    clips = annotated_clips(folders)
    root = Path(os.path.commonpath([clip.path.parent for clip in clips]))
    parts = {"every": clips}
    train, held_out = ([clip for clip in clips if clip.trains is trains] for trains in (True, False))
    if train and held_out:
        parts |= {"train": train, "held_out": held_out}
    output.mkdir(parents=True, exist_ok=True)
    for name, some in parts.items():
        rows = [row for clip in some for row in _rows(clip, root, motion)]
        write_text(output / f"{name}.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    asked = all(any(clip.questions for clip in some) for some in (train, held_out))
    about = {"media_root": str(root), "motion": motion, "questions": "yes" if asked else ""}
    for name, value in about.items():
        write_text(output / name, value)


def _rows(clip: AnnotatedClip, root: Path, motion: str) -> list[dict[str, Any]]:
    name = {"video": clip.path.relative_to(root).as_posix()}
    questions = [one | {"question_type": kind_of(one["question_id"], motion)} for one in clip.questions]
    return [name | row for row in (*clip.captions, *questions)]


def kind_of(name: str, motion: str) -> str:
    """The kind of a clip or a question; empty where no patterns tell it."""
    return KINDS[any(fnmatchcase(name, pattern) for pattern in motion.split())] if motion else ""


@dataclass(frozen=True)
class Shares:
    """What share of N clips is right, clip by clip in one order: (N,) from 0 to 1, by what is shown of them."""

    title: str
    chance: float
    right: dict[str, np.ndarray]

    @property
    def count(self) -> int:
        """The number of clips."""
        return len(next(iter(self.right.values())))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval by Wilson of a share, from 0 to 1, of `count` independent cases; never empty."""
    centre = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + Z * Z / count) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def sign_test(wins: int, losses: int) -> float:
    """The probability that as unequal numbers arise where either is as likely: two-sided, exact."""
    total, least = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total)


def prefers_reranking(folder: Path) -> bool:
    """Whether the checkpoint that the study is about re-ranks, as its validation found."""
    given = _details(folder / "given" / "evaluation" / "4_frames")
    return given["matching_trained"] and given["reranks"] is not False


def read_shares(folder: Path) -> list[Shares]:
    """The shares of all models that the study has evaluated in its folder."""
    motion, reranks = (folder / "annotations" / "motion").read_text(), prefers_reranking(folder)
    found = []
    for model, title in MODELS.items():
        labels = {shown: folder / model / "evaluation" / shown for shown in SHOWN}
        if not all(path.is_dir() for path in labels.values()):
            continue
        if model.endswith("_qa"):
            chance = dict.fromkeys(ANSWERED.values(), _details(labels["4_frames"])["chance"]["overall"])
            right = {shown: answered(path) for shown, path in labels.items()}
        else:
            chance = _chance(labels["4_frames"], motion)
            right = {shown: retrieved(path, motion, reranks) for shown, path in labels.items()}
        for name, low in chance.items():
            if all(name in each for each in right.values()):
                found.append(Shares(f"{title}: {name}", low, {shown: each[name] for shown, each in right.items()}))
    return found


def retrieved(folder: Path, motion: str, reranks: bool) -> dict[str, np.ndarray]:
    """The share of each clip's texts that find it first, or among 5, of all clips or of those of a kind; (N,) each."""
    with np.load(folder / "scores.npz") as scores:
        matrix = scores["clips/t2i_x"] if reranks and "clips/t2i_x" in scores else scores["clips/i2t_emb"].T
    found = {}
    for kind, (texts, clips, truth) in _galleries(folder, motion).items():
        ranks = true_ranks(matrix[np.ix_(texts, clips)], truth).by_index
        owners = [items[0] for items in truth]
        for most in (1, 5) if kind == ALL else (1,):
            found[kind if most == 1 else f"{kind}, R@{most}"] = _by_clip(owners, ranks < most)
    return found


def _galleries(folder: Path, motion: str) -> dict[str, tuple[list[int], list[int], list[list[int]]]]:
    """Of all clips and of each kind the numbers of texts and clips, and the true ones of each text among these."""
    predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))["clips"]
    names = [query["visual"] for query in predictions["visual_to_text"]]
    found = {}
    for kind in (ALL, *(KINDS if motion else ())):
        clips = [number for number, name in enumerate(names) if kind in (ALL, kind_of(Path(name).name, motion))]
        place = {names[number]: index for index, number in enumerate(clips)}
        truth = [[place[name] for name in query["correct"] if name in place] for query in predictions["text_to_visual"]]
        texts = [number for number, items in enumerate(truth) if items]
        if texts:
            found[kind] = texts, clips, [truth[number] for number in texts]
    return found


def _chance(folder: Path, motion: str) -> dict[str, float]:
    found = {}
    for kind, (_, clips, truth) in _galleries(folder, motion).items():
        metrics = chance_metrics([[0]] * len(clips), truth)
        found[kind] = metrics["img_r1"]
        if kind == ALL:
            found[f"{kind}, R@5"] = metrics["img_r5"]
    return found


def answered(folder: Path) -> dict[str, np.ndarray]:
    """The accuracy of the answers about each clip, (N,) by kind of question."""
    found = {}
    for part in read_outcomes(folder / "outcomes.parquet"):
        for metric, name in ANSWERED.items():
            if metric in part.points:
                known = ~np.isnan(part.points[metric])
                found[name] = _by_clip(np.array(part.visuals)[known], part.points[metric][known])
    return found


def _by_clip(owners: Sequence[Any] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """The means (N,) of values (Q,) by their clip, in the order of the clips."""
    _, number = np.unique(owners, return_inverse=True)
    return np.bincount(number, values) / np.bincount(number)


def _details(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["splits"]["clips"]


def table(found: Sequence[Shares]) -> str:
    """Markdown: a row a model and kind of clips, a column for each way of showing them, 4 frames against the others."""
    head = ["right in %", "clips", *SHOWN.values(), "chance", "4 frames against 1", "against the other order"]
    rows = [[share.title, str(share.count), *map(_cell, share.right.values()), f"{share.chance:.1f}",
             *(_change(share.right[other], share.right["4_frames"]) for other in ("1_frame", "shuffled"))]
            for share in found]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _cell(right: np.ndarray) -> str:
    low, high = wilson(float(right.mean()), len(right))
    return f"{100 * right.mean():.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _change(first: np.ndarray, second: np.ndarray) -> str:
    wins, losses = int((second > first).sum()), int((second < first).sum())
    return f"{wins} better, {losses} worse, p {sign_test(wins, losses):.2f}"


def explanation(found: Sequence[Shares], reranks: bool) -> str:
    """What the table's numbers are, and how little they can show."""
    ranking = "re-ranked by VTM" if reranks else "by the dual encoder"
    least = next(number for number in range(1, 99) if sign_test(number, 0) < 0.05)
    counts = sorted({share.count for share in found})
    needed = ", ".join(f"{100 * least / count:.0f} points of {count} clips" for count in counts if count >= least)
    return (
        f"Retrieval: R@1 of clips by text, {ranking} as the checkpoint prefers, within the clips of a kind. "
        "In brackets 95 % intervals (Wilson, over clips); p: sign test over clips. "
        f"A difference of fewer than {least} clips, all in one direction ({needed}), cannot reach p < 0.05"
        f"{'; nor can any of fewer clips' if counts[0] < least else ''}.\n"
    )


def draw(found: Sequence[Shares], path: Path) -> None:
    """Bars of every share with its interval, and chance as a line."""
    bars: dict[str, list[tuple[float, float | tuple[float, float]]]] = {}
    for shown, name in SHOWN.items():
        for share in found:
            value = float(share.right[shown].mean())
            low, high = wilson(value, share.count)
            bars.setdefault(name, []).append((100 * value, (100 * (value - low), 100 * (high - value))))
    names = [f"{share.title} ({share.count})" for share in found]
    label = "percent right; in brackets the number of clips; black: chance; whiskers: 95 % intervals"
    path.write_bytes(png(grouped_bars(names, bars, [share.chance for share in found], label)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    before = commands.add_parser("annotations", help="write what is to be packed")
    before.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="clips with JSON lists of their texts")
    before.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the annotations")
    before.add_argument("--motion", default="", metavar="PATTERNS", help="clips and question ids of motion")
    after = commands.add_parser("table", help="write study.md and study.png from the evaluations")
    after.add_argument("folder", type=Path, help="of the study")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.command == "annotations":
        write_annotations(options.folders, options.motion, options.output)
        return 0
    found = read_shares(options.folder)
    text = f"{table(found)}\n{explanation(found, prefers_reranking(options.folder))}"
    (options.folder / "study.md").write_text(text)
    draw(found, options.folder / "study.png")
    sys.stdout.write("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
