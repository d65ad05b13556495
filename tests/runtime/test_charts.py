"""Charts: the same bytes each time, in the colours of the page, and empty without points."""

import subprocess
import sys

from places import ROOT

from runtime.charts import Curve, Panel, histogram_svg, panel_svg, smooth


def test_inline_charts_take_the_colours_of_the_page_and_are_the_same_each_time():
    panel = Panel([Curve("a < b", [(1, 3.0), (2, 2.0), (3, float("nan"))], color=1)], x_label="step")
    text = panel_svg(panel)
    assert text == panel_svg(panel)
    assert "var(--series-1, #e2711d)" in text
    assert 'aria-label="a &lt; b over step"' in text
    assert "http" not in text
    assert "<style" not in text
    assert ">step</text>" in text


def test_without_a_finite_point_there_is_no_chart():
    assert panel_svg(Panel([Curve("loss", [(1, float("nan"))])])) == ""


def test_rare_spikes_do_not_flatten_a_chart_from_zero():
    points = [(step, 1.0) for step in range(199)] + [(199, 1e6)]
    assert ">1.0</text>" in panel_svg(Panel([Curve("loss", points)], from_zero=True))


def test_histograms_draw_open_bins_paler():
    assert histogram_svg("words", {"<5": 3, "5-10": 9, "≥10": 1}, ["<5", "≥10"]).count("opacity: 0.45") == 2


def test_smoothing_keeps_a_constant_and_the_mean_of_a_line():
    assert smooth([3.0] * 100) == [3.0] * 100
    assert smooth([float(i) for i in range(100)])[50] == 50.0


def test_only_drawing_imports_matplotlib():
    program = "import sys, runtime.charts, sharding.report.gallery; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
