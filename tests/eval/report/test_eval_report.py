"""Evaluation folders and the report: complete, self-contained, honest about what is missing, opened in a browser."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from eval.config import EvalConfig
from eval.outputs import write_evaluation
from eval.report.__main__ import main
from eval.report.evaluations import find_evaluations, read_evaluation
from eval.report.gallery import choose_queries, strip
from eval.report.grouping import group_test_sets
from eval.report.page import write_report
from eval.report.tables import bars, console_table, format_table, tables
from eval.run import subject_of
from eval.tasks.retrieval import RetrievalTask
from model.history import History
from tests.eval.small import Drawn, Words, small_model

TASK = RetrievalTask()


def jpeg(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


class Pictured(Drawn):
    """The drawn clips, with pictures."""

    def thumbnail(self, i, num_frames=4):
        assert i not in self.broken
        return [jpeg(self.pixels[i, f % self.num_frames].numpy()) for f in range(num_frames)]


def evaluation_in(folder, save_scores=True, history=None, **settings):
    config, dataset, model = EvalConfig(**{"k_test": 6, "gallery": 3, **settings}), Pictured(), small_model()
    model.history = history or model.history
    result = TASK.evaluate(model, dataset, Words(), config, 2)
    output = TASK.output(result, dataset, config)
    write_evaluation(folder, [output], config, subject_of(model), save_scores=save_scores)
    return dataset, result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with loss curves and two evaluations, the second with a broken clip and captions of markup."""
    folder, config = tmp_path_factory.mktemp("runs") / "finetune", EvalConfig(k_test=6, gallery=3)
    evaluation_in(folder / "evaluation" / "first")
    dataset = Pictured(broken=(5,))
    result = TASK.evaluate(small_model(), dataset, Words(), config, 2)
    dataset.texts = ["<script>alert(1)</script>"] * len(dataset.texts)
    write_evaluation(folder / "evaluation" / "second", [TASK.output(result, dataset, config)], config)
    steps = [{"step": s, "loss": 5 / s, "loss_itc": 4 / s, "loss_itm": 1 / s, "lr": 1e-4} for s in range(1, 50)]
    lines = [json.dumps(step) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')  # cut short by an interruption
    return folder


def test_the_folder_holds_metrics_scores_and_predictions(tmp_path):
    folder = tmp_path / "run" / "evaluation" / "label"
    dataset, result = evaluation_in(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result.metrics
    assert list(metrics) == ["drawn/", "drawn_emb/"]
    assert list(metrics["drawn/"])[:4] == ["txt_r1", "txt_r5", "txt_r10", "txt_r_mean"]

    scores = np.load(folder / "scores.npz")
    np.testing.assert_array_equal(scores["drawn/t2i_x"], result.scores.text_to_visual)
    np.testing.assert_array_equal(scores["drawn/i2t_emb"], result.scores.similarity)

    predictions = json.loads((folder / "predictions.json").read_text())["drawn"]
    assert [entry["text"] for entry in predictions["text_to_visual"]] == dataset.texts
    assert [entry["visual"] for entry in predictions["visual_to_text"]] == dataset.sources
    found = predictions["text_to_visual"][0]["found"]
    assert len(found) == 6  # no more than were candidates
    best = int(result.scores.text_to_visual[0].argmax())
    assert found[0] == {
        "item": dataset.sources[best],
        "score": pytest.approx(float(result.scores.text_to_visual[0, best]), abs=1e-4),
    }
    assert (folder / "report.html").is_file()


def test_evaluating_again_replaces_the_folder_here_without_scores(tmp_path):
    folder = tmp_path / "evaluation" / "label"
    evaluation_in(folder)
    (folder / "old").touch()
    evaluation_in(folder, k_test=0, save_scores=False)
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json", "evaluation.json", "outcomes.parquet", "predictions.json", "gallery.json", "thumbnails",
        "report.html",
    }  # fmt: skip
    assert list(json.loads((folder / "metrics.json").read_text())) == ["drawn_emb/"]
    assert [path.name for path in folder.parent.iterdir()] == ["label"]


RERANKED, DUAL = "drawn/", "drawn_emb/"


@pytest.mark.parametrize(
    ("history", "keys", "note"),
    [
        (History(), [RERANKED, DUAL], ""),
        (History(reranks=True), [RERANKED, DUAL], ""),
        (History(reranks=False), [DUAL, RERANKED], "dual encoder first, because re-ranking was no better"),
        (History(matching_trained=False), [DUAL], "not re-ranked, because no loss trained the matching head"),
        (History(matching_trained=False), [DUAL, RERANKED], "dual encoder first, because no loss trained the matching"),
    ],
    ids=["unknown", "better", "worse", "untrained", "untrained, but asked for"],
)
def test_the_ranking_that_the_validation_preferred_comes_first_everywhere(tmp_path, history, keys, note):
    folder = tmp_path / "run" / "evaluation" / "label"
    _, result = evaluation_in(folder, history=history, eval_x_only=not history.matching_trained and len(keys) == 2)
    assert set(result.metrics) == set(keys)
    evaluation = read_evaluation(folder)
    (table,) = tables(group_test_sets([evaluation]))
    assert [(row["key"], row["secondary"]) for row in table["rows"]] == [(key, key != keys[0]) for key in keys]
    (group,) = bars([table], "retrieval")
    assert [bar["value"] for bar in group["bars"]] == [result.metrics[keys[0]]["img_r1"]]
    shown = json.loads((folder / "predictions.json").read_text())["drawn"]["text_to_visual"][0]["found"][0]
    scores = result.scores.text_to_visual if keys[0] == RERANKED else result.scores.similarity.T
    assert shown["score"] == pytest.approx(float(scores[0].max()), abs=1e-4)
    page, console = (folder / "report.html").read_text(), console_table([evaluation])
    assert (note in page, note in console) == (True, True)
    assert ("because" in console) == bool(note)


def test_re_ranking_by_another_score_than_the_validation_is_named_and_not_judged_by_it(tmp_path):
    folder = tmp_path / "run" / "evaluation" / "label"
    evaluation_in(folder, history=History(reranks=False), rerank_score="itm+itc")
    (table,) = tables(group_test_sets([read_evaluation(folder)]))
    assert [row["ranking"] for row in table["rows"]] == ["re-ranked by itm+itc", "dual encoder"]
    assert table["notes"] == []


def test_an_evaluation_after_an_epoch_is_the_validation_itself(tmp_path):
    folder = tmp_path / "run" / "evaluation" / "epoch_01"
    _, result = evaluation_in(folder)
    for change, first in ((1, DUAL), (-1, RERANKED)):
        metrics = result.metrics | {
            DUAL: {**result.metrics[DUAL], "r_mean": result.metrics[RERANKED]["r_mean"] + change}
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        assert tables(group_test_sets([read_evaluation(folder)]))[0]["rows"][0]["key"] == first


def test_reports_name_what_a_run_started_from(tmp_path):
    runs = [tmp_path / "tuned", tmp_path / "old"]
    evaluation_in(runs[0] / "evaluation" / "first", history=History(("runs/base", "random weights")))
    evaluation_in(runs[1] / "evaluation" / "second")
    page = write_report(runs, tmp_path / "report.html").read_text()
    for text in (page, console_table(find_evaluations(runs))):
        assert "tuned: training started from runs/base, which started from random weights" in text
        assert text.count("training started from") == 1  # of the other it is not recorded


def test_the_page_is_self_contained_and_shows_every_part(run, tmp_path):
    page = write_report([run], tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")  # but for parts of the charts themselves
    for part in ("finetune · first", "finetune · second", "chance", "clips/005.mp4", "truncated JPEG", "</i>VTM"):
        assert part in page
    assert "</i>MLM" not in page  # a loss that the run does not have
    assert page.count("<svg") == 1  # one run, one chart of losses
    assert "correct one: rank" in page
    assert "not readable" in page  # the broken clip is the missed answer of a worst query
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert [e.folder.name for e in find_evaluations([run])] == ["first", "second"]  # by time


def test_command_line_merges_runs_and_prints_a_table(run, tmp_path, capsys):
    output = tmp_path / "all.html"
    assert main([str(run / "evaluation" / "first"), str(run), "--output", str(output), "--title", "Both"]) == 0
    text = capsys.readouterr().out
    assert "finetune · first: drawn_emb" in text
    assert "chance drawn" in text
    assert str(output) in text
    assert "<h1>Both</h1>" in output.read_text()


def test_a_folder_without_an_evaluation_is_one_clear_line(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} has no evaluation")
    assert error.count("\n") == 1
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metrics\.json cannot be read"):
        read_evaluation(tmp_path)


def test_a_browser_shows_every_part_without_errors(run, visitor, tmp_path):
    page = visitor.page
    page.goto(write_report([run], tmp_path / "report.html").as_uri())
    for number in range(2):
        page.select_option("#set", str(number))
        for direction in ("text_to_visual", "visual_to_text"):
            page.click(f"button[value={direction}]")
            for kind in ("best", "worst", "random"):
                page.click(f"button[value={kind}]")
                shown, of = visitor.pictures()
                assert shown == of
                assert of >= 2  # one clip is not readable
    page.reload()  # the address names what was shown
    assert page.get_attribute("button[value=random]", "aria-pressed") == "true"
    assert visitor.errors == []
    assert visitor.sticks_out() <= 0


def test_queries_are_the_best_the_worst_and_the_same_random_ones():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 12))
    truth = [[i % 12] for i in range(30)]
    scores[4, 4] = 9.0
    scores[17, 5] = -9.0
    chosen = choose_queries(scores, truth, 4)
    assert chosen["best"][0].query == 4
    assert chosen["best"][0].rank == 1
    assert chosen["best"][0].correct is None
    worst = chosen["worst"][0]
    assert (worst.query, worst.rank, worst.correct.rank, worst.correct.item) == (17, 12, 12, 5)
    other = choose_queries(rng.normal(size=(30, 12)), truth, 4)
    assert [q.query for q in other["random"]] == [q.query for q in chosen["random"]]


def test_an_item_outside_the_candidates_has_no_rank():
    scores = np.full((2, 8), -100.0)
    scores[:, :2] = 1.0, 2.0
    query = choose_queries(scores, [[5], [1]], 2, unranked=-100.0)["worst"][0]
    assert query.rank is None
    assert query.correct is None
    assert query.correct_item == 5
    assert [hit.item for hit in query.top] == [1, 0]


@pytest.mark.parametrize("shape", [(40, 90, 3), (90, 40, 3), (33, 33, 3), (10, 200, 3)])
def test_a_strip_fits_frames_of_any_shape_into_squares(shape):
    frames = [jpeg(np.full(shape, 250, dtype=np.uint8))] * 3
    with Image.open(io.BytesIO(strip(frames, cell=32))) as image:
        assert image.size == (96, 32)
        assert image.getpixel((16, 16))[0] > 200


def test_table_lines_up():
    metrics = {"val/": {"txt_r1": 50.0, "r_mean": 43.125}, "val_emb/": {"txt_r1": 100.0, "r_mean": 7.0}}
    lines = format_table(metrics, {"chance val": {"txt_r1": 0.1, "r_mean": 0.5}}).splitlines()
    assert lines[0].split() == ["txt_r1", "mean"]
    assert lines[2].split() == ["val", "50.00", "43.12"]
    assert lines[-1].split() == ["chance", "val", "0.10", "0.50"]
    assert len({len(line) for line in lines}) == 1
