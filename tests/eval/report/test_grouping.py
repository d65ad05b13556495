"""Test sets are told apart by what they hold, whatever their names: in reports, tables and comparisons."""

import json
import re
import shutil

import numpy as np
import pytest

from eval.compare import main as compare
from eval.config import EvalConfig
from eval.metrics import chance_metrics, retrieval_metrics
from eval.outcomes import Outcomes, outcomes_of_ranks
from eval.outputs import SplitOutput, write_evaluation
from eval.report.__main__ import main as report
from eval.report.evaluations import find_evaluations
from eval.report.grouping import group_test_sets
from eval.report.tables import bars, console_table, frame_curves, tables
from train.plot import write_plot


def retrieval(count, name="test", words="text", corpus=None, frames=1, order=1, hit=0.5):
    """An evaluation of `count` clips with a text each, of which a share `hit` is found."""
    numbers = list(range(count))[::order]
    sources, texts = [f"{n:03}.mp4" for n in numbers], [f"{words} {n}" for n in numbers]
    truth = [[n] for n in range(count)]
    scores = np.eye(count, dtype=np.float32)
    scores[int(hit * count) :] *= -1
    metrics = retrieval_metrics(scores, scores.T, truth, truth).values
    ranks = np.array([0 if n < hit * count else count - 1 for n in range(count)])
    details = {
        "task": "retrieval", "media_type": "video", "num_visuals": count, "num_texts": count, "num_frames": frames,
        "chance": chance_metrics(truth, truth), "depends_on_ties": {}, "missing": {}, "seconds": {},
        **({"corpus": corpus} if corpus else {}),
    }  # fmt: skip
    predictions = {
        "text_to_visual": [{"text": t, "correct": [s], "found": []} for t, s in zip(texts, sources)],
        "visual_to_text": [{"visual": s, "correct": [t], "found": []} for t, s in zip(texts, sources)],
    }
    outcomes = [
        outcomes_of_ranks(f"{name}_emb/", "text_to_visual", texts, sources, ranks),
        outcomes_of_ranks(f"{name}_emb/", "visual_to_text", sources, sources, ranks),
    ]
    nothing = {"best": [], "worst": [], "random": []}
    gallery = {"text_to_visual": nothing, "visual_to_text": nothing, "texts": {}, "visuals": {}}
    return SplitOutput(name, {f"{name}_emb/": metrics}, details, outcomes, predictions, gallery)


def questions(count, name="test", ask="what is", answers=4, accuracy="exact match", right=0.5):
    """An evaluation of `count` questions with ids from 0, of which the share `right` is answered rightly."""
    values = [float(n < right * count) for n in range(count)]
    predictions = [
        {
            "source": f"{n}.mp4", "question_id": str(n), "question": f"{ask} {n}", "question_type": "",
            "answer_type": "", "answer": "red", "correct": [{"text": "red", "share": 1.0}], "top": [],
            "accuracy": value,
        }
        for n, value in enumerate(values)
    ]  # fmt: skip
    details = {
        "task": "qa", "media_type": "video", "num_visuals": count, "num_questions": count, "num_annotated": count,
        "num_unanswered": 0, "num_frames": 1, "missing": {}, "seconds": {}, "accuracy": accuracy,
        "protocol": "ranked", "num_answers": answers, "chance": {"overall": 100 / answers},
    }  # fmt: skip
    ids, visuals = [p["question_id"] for p in predictions], [p["source"] for p in predictions]
    outcomes = [Outcomes(name, "accuracy", ids, visuals, np.array(values))]
    gallery = {"examples": {}, "visuals": {}}
    return SplitOutput(name, {name: {"overall": 100 * right}}, details, outcomes, predictions, gallery)


def write(folder, *outputs, recorded=True):
    """An evaluation in RUN/evaluation/LABEL; not recorded: as it was before evaluations said what they hold."""
    write_evaluation(folder, outputs, EvalConfig(gallery=0))
    if not recorded:
        details = json.loads((folder / "evaluation.json").read_text())
        for split in details["splits"].values():
            del split["items_sha256"]
            split.pop("corpus", None)
        (folder / "evaluation.json").write_text(json.dumps(details))
    return folder


def grouped(*folders):
    return group_test_sets(find_evaluations(folders))


@pytest.mark.parametrize("recorded", [True, False])
def test_two_corpora_of_one_name_have_tables_and_chance_levels_of_their_own(tmp_path, capsys, recorded):
    one = write(tmp_path / "a/evaluation/x", retrieval(20, hit=0.25), recorded=recorded)
    other = write(tmp_path / "b/evaluation/x", retrieval(200, hit=0.25), recorded=recorded)
    sets = grouped(one, other)
    assert [each.title for each in sets] == ["test (20 clips, 20 texts)", "test (200 clips, 200 texts)"]
    times = [bar["times"] for group in bars(tables(sets), "retrieval") for bar in group["bars"]]
    assert times == [5, 50]
    assert report([str(one), str(other), "--output", str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("chance test")] == ["26.67", "2.67"]
    assert any(line.startswith("a · x: test_emb (20 clips, 20 texts)") for line in lines)
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="results"') == 2
    assert "2 evaluations on 2 test sets" in page


CATS, DOGS = ({"url": f"data/{name}", "sha256": name * 8} for name in ("cats", "dogs"))


@pytest.mark.parametrize(
    ("corpora", "recorded", "titles"),
    [
        ((None, None), True, ["test (a · x)", "test (b · x)"]),
        ((None, None), False, ["test (a · x)", "test (b · x)"]),
        ((CATS, DOGS), True, ["test (data/cats)", "test (data/dogs)"]),
    ],
)
def test_corpora_of_one_name_and_size_are_told_apart_too(tmp_path, corpora, recorded, titles):
    one = write(tmp_path / "a/evaluation/x", retrieval(20, corpus=corpora[0]), recorded=recorded)
    other = write(tmp_path / "b/evaluation/x", retrieval(20, words="other", corpus=corpora[1]), recorded=recorded)
    assert [each.title for each in grouped(one, other)] == titles


@pytest.mark.parametrize("recorded", [True, False])
def test_a_test_set_is_one_whatever_its_name_its_order_and_its_url(tmp_path, recorded):
    moved = {"url": "s3://b/x", "sha256": "1" * 64}
    one = write(tmp_path / "a/evaluation/x", retrieval(20, corpus=moved | {"url": "data/x"}), recorded=recorded)
    other = write(tmp_path / "b/evaluation/x", retrieval(20, "photos", order=-1, corpus=moved), recorded=recorded)
    (test_set,) = grouped(one, other)
    assert (test_set.title, test_set.packings) == ("test, photos", ["", ""])
    text = console_table(find_evaluations([one, other]))
    assert text.count("chance test, photos") == 1
    assert "b · x: photos_emb" in text


def test_a_repacked_corpus_is_the_same_test_set_and_the_rows_tell(tmp_path):
    corpora = [{"url": f"data/x{size}", "sha256": str(size) * 16} for size in (1128, 1256)]
    folders = [write(tmp_path / f"{i}/evaluation/x", retrieval(9, corpus=c)) for i, c in enumerate(corpora)]
    (test_set,) = grouped(*folders)
    assert test_set.packings == ["data/x1128 (11281128)", "data/x1256 (12561256)"]
    assert report([*map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    assert "hold the same items in different shards" in (tmp_path / "page.html").read_text()


def test_answers_to_choose_from_and_accuracies_have_tables_of_their_own(tmp_path):
    variants = [{}, {"answers": 50}, {"accuracy": "VQA soft accuracy"}]
    folders = [write(tmp_path / f"{i}/evaluation/x", questions(9, **v)) for i, v in enumerate(variants)]
    assert [table["chance"]["overall"] for table in tables(grouped(*folders))] == [25, 2, 25]


def test_one_corpus_under_two_names_in_one_evaluation_has_two_rows(tmp_path):
    folder = write(tmp_path / "a/evaluation/x", retrieval(20, "a", hit=0.5), retrieval(20, "b", hit=0.25))
    (table,) = tables(grouped(folder))
    assert [row["title"] for row in table["rows"]] == ["a · x: a", "a · x: b"]
    assert [bar["value"] for bar in bars([table], "retrieval")[0]["bars"]] == [50, 25]


def test_runs_of_one_name_keep_their_rows_bars_and_curves(tmp_path):
    folders = []
    for number, run in enumerate(("first/small", "second/small")):
        for frames in (1, 2):
            output = retrieval(20, frames=frames, hit=(1 + number + frames) / 10)
            folders.append(write(tmp_path / run / "evaluation" / f"{frames}_frames", output))
    evaluations = find_evaluations(folders)
    assert [each.run_name for each in evaluations] == ["first/small"] * 2 + ["second/small"] * 2
    sets = group_test_sets(evaluations)
    assert len(bars(tables(sets), "retrieval")[0]["bars"]) == 4
    assert frame_curves(sets)[0]["names"] == [f"{run}, concat, dual encoder" for run in ("first/small", "second/small")]
    assert len(re.findall("small · ", console_table(evaluations))) == 4


def test_curves_of_two_test_sets_of_one_name_have_panels_of_their_own(tmp_path):
    for run, words in (("a", "text"), ("b", "other"), ("c", "text")):
        write(tmp_path / run / "evaluation/epoch_01", retrieval(20, "val", words=words), retrieval(9, "same"))
        lines = [{"step": 1, "loss": 1.0}, {"step": 1, "epoch": 1, "val_emb/r_mean": 5.0, "same_emb/r_mean": 9.0}]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [tmp_path / name for name in "abc"]
    drawn = write_plot(runs, tmp_path / "plot.png")
    assert [name for name in drawn if "/" in name] == [
        "same_emb/r_mean", *(f"val_emb ({run})/r_mean" for run in runs),
    ]  # fmt: skip
    drawn = write_plot([runs[0], runs[2]], tmp_path / "plot.png")
    assert [name for name in drawn if "/" in name] == ["same_emb/r_mean", "val_emb/r_mean"]


def test_ranks_among_other_candidates_are_not_compared(tmp_path, capsys):
    one = write(tmp_path / "a/evaluation/x", retrieval(20), questions(9, "asked"))
    other = write(tmp_path / "b/evaluation/x", retrieval(200), questions(9, "asked", right=1))
    assert compare([str(one), str(other), "--resamples", "9"]) == 0
    text = capsys.readouterr()
    assert "asked  (9 queries)" in text.out
    assert "test_emb" not in text.out
    shutil.rmtree(other)
    write(other, retrieval(200))
    assert compare([str(one), str(other)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: test_emb/: the evaluations rank different candidates")
    assert error.endswith("evaluate both on one corpus to compare them")


@pytest.mark.parametrize("recorded", [True, False])
def test_questions_of_one_id_and_visual_are_not_taken_for_each_other(tmp_path, capsys, recorded):
    one = write(tmp_path / "a/evaluation/x", questions(9), recorded=recorded)
    other = write(tmp_path / "b/evaluation/x", questions(9, ask="how many", right=1), recorded=recorded)
    assert compare([str(one), str(other)]) == 2
    assert "test: the evaluations share no query: evaluate both on one corpus" in capsys.readouterr().err
    part = write(tmp_path / "c/evaluation/x", questions(5, right=1), recorded=recorded)
    assert compare([str(one), str(part), "--resamples", "9"]) == 0
    assert "test  (5 queries, without 4 of A and 0 of B)" in capsys.readouterr().out


def test_without_predictions_the_same_questions_are_compared_and_others_are_refused(tmp_path, capsys):
    one = write(tmp_path / "a/evaluation/x", questions(9), recorded=True)
    other = write(tmp_path / "b/evaluation/x", questions(9, right=1), recorded=True)
    part = write(tmp_path / "c/evaluation/x", questions(5), recorded=True)
    (other / "predictions.json").unlink()
    assert compare([str(one), str(other), "--resamples", "9"]) == 0
    assert "test  (9 queries)" in capsys.readouterr().out
    assert compare([str(part), str(other)]) == 2
    assert "without predictions.json of both" in capsys.readouterr().err


def test_one_test_set_under_two_names_is_compared(tmp_path, capsys):
    one = write(tmp_path / "a/evaluation/x", retrieval(20, "val"))
    other = write(tmp_path / "b/evaluation/x", retrieval(20, "photos", hit=0.75))
    assert compare([str(one), str(other), "--resamples", "9"]) == 0
    text = capsys.readouterr().out
    assert "val_emb/ of A, photos_emb/ of B  (40 queries)" in text
    assert "+25.00" in text
