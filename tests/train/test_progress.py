"""What takes long outside of training steps reports progress as it goes, so that the watchdog does not end the job."""

import fsspec
import pytest

from runtime import activity
from runtime.activity import begin, present_activity, progress, waiting
from storage import files
from train.checkpoints.copies import RemoteCheckpoints


@pytest.fixture
def reports(monkeypatch):
    """Everything that is reported."""
    reported = []
    monkeypatch.setattr(activity, "_report", lambda **changes: reported.append(changes["position"]))
    return reported


def test_a_report_names_task_position_and_exchange():
    begin("evaluating images")
    progress("visual 8 of 50 encoded")
    before = present_activity()
    assert before.text == "evaluating images: visual 8 of 50 encoded"
    with waiting("gather_rows"):
        assert present_activity().collective == "gather_rows"
        assert present_activity().text == before.text
    assert present_activity().collective == ""
    assert present_activity().since > before.since


def test_a_large_file_is_flushed_piece_by_piece(monkeypatch, tmp_path, reports):
    monkeypatch.setattr(files, "PIECE", 1 << 20)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\1" * (5 << 19))
    files.flush(path)
    files.flush(tmp_path)
    sizes = [each.split(", ")[-1] for each in reports if ", " in each]
    assert sizes == ["0 bytes of 2.6 MB", "1.0 MB of 2.6 MB", "2.1 MB of 2.6 MB"]
    assert path.read_bytes() == b"\1" * (5 << 19)


def test_an_upload_reports_its_bytes(tmp_path, reports):
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "part").write_bytes(bytes(12 << 20))
    (tmp_path / "config.yaml").write_text("")
    RemoteCheckpoints("memory://copies", {}).upload(checkpoint, tmp_path / "config.yaml", keep=1)
    assert fsspec.filesystem("memory").size("/copies/step_00000001/part") == 12 << 20
    sizes = [each.rpartition(", ")[2] for each in reports if "uploading part, " in each]
    assert len(sizes) > 1
    assert sizes[-1] == "12.6 MB"
