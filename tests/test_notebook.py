"""The notebook runs from its first cell to its last one, learns, and finds the picture of its query."""

import ast
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

NOTEBOOK = ROOT / "examples/start.ipynb"


@pytest.mark.timeout(300)
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "seconds = 60  # of training" in cells[0].source
    cells[0].source = cells[0].source.replace("seconds = 60", "seconds = 4")
    cells[-1].source += "\nfound = (history, best, len(pictures))\nfound"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    result = next(output for output in cells[-1].outputs if output.output_type == "execute_result")
    history, best, count = ast.literal_eval(result.data["text/plain"])
    assert count == 50
    assert sum(history[-1].values()) < sum(history[0].values())
    assert len(best) == 5
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
