"""Saving and loading our own format: round trip, changes of size, errors."""

import json

import pytest
import torch
from small_models import CLS, MASK, PAD, small_batch, small_config, small_model

from model.checkpoints.files import Weights, resolve_weights
from model.checkpoints.loading import fit_weights, load_model, load_weights, save_model
from model.config import LossWeights, TemporalConfig, with_changes
from model.singularity import Singularity
from model.vqa import SingularityQA
from preprocessing.config import Preprocessing


@pytest.fixture
def saved(tmp_path, model):
    save_model(model, model.config, tmp_path / "weights")
    return tmp_path / "weights"


def outputs(model, frames=1, size=32):
    images, ids, mask, _ = small_batch(frames=frames, size=size)
    with torch.no_grad():
        tokens, pooled = model.eval().encode_visual(images)
        return [tokens, pooled, model.match_logits(model.encode_text(ids, mask)[0], mask, tokens)]


def test_a_saved_model_loads_bit_identical(saved, model):
    loaded = load_model(saved)
    assert loaded.config == model.config
    assert (loaded.pad_id, loaded.cls_id, loaded.mask_id) == (PAD, CLS, MASK)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for ours, theirs in zip(outputs(model), outputs(loaded)):
        assert torch.equal(ours, theirs)
    assert not list(saved.glob(".*"))


def test_a_state_dict_is_saved_like_a_model(tmp_path, model):
    save_model(model.state_dict(), model.config, tmp_path, {"pad_id": 1, "cls_id": 5, "mask_id": 7})
    loaded = load_model(tmp_path)
    assert (loaded.pad_id, loaded.cls_id, loaded.mask_id) == (1, 5, 7)
    (tmp_path / "vocab.txt").write_text("\n".join(["a", "[CLS]", "[PAD]", "b", "[SEP]", "[MASK]"]) + "\n")
    assert load_weights(tmp_path).special_ids == {"pad_id": 2, "cls_id": 1, "mask_id": 5}


def test_a_multi_frame_model_starts_with_the_scores_of_its_single_frame_model(saved, model):
    changes = {"num_frames": 4, "add_temporal_embed": True, "temporal_vision_encoder.enable": True}
    longer = load_model(saved, changes)
    assert longer.temporal_embeddings.shape[1] == 4
    for ours, theirs in zip(outputs(model), outputs(longer)):
        torch.testing.assert_close(ours, theirs)  # of one frame
    assert outputs(longer, frames=4)[0].shape[1] == 4 * 17


def test_changes_to_weights_are_reported(saved):
    weights = load_weights(saved)
    changed = small_model(seed=1, num_frames=2, temporal_vision_encoder=TemporalConfig(enable=True, num_layers=1))
    report = fit_weights(changed, weights, "weights")
    assert report.resized == ["temporal_embeddings"]
    assert report.fresh
    assert all(name.startswith("temporal_vision_encoder.") for name in report.fresh)
    assert not report.dropped


@pytest.mark.parametrize("kind", ["beit", "vit"])
def test_another_image_size_interpolates_the_positions(tmp_path, kind):
    config = small_config()
    config.vision_encoder.type = kind
    model = type(small_model())(config, PAD, CLS, MASK)
    save_model(model, config, tmp_path)
    larger = load_model(tmp_path, {"image_res": 48})
    assert outputs(larger, size=48)[0].shape == (4, 37, 48)


@pytest.mark.parametrize("width", [32, 48])
def test_question_answering_takes_its_decoder_from_the_fusion_layers(tmp_path, width):
    config = small_config()
    config.vision_encoder.width, config.vision_encoder.heads = width, width // 16
    model = Singularity(config, PAD, CLS, MASK)
    save_model(model, config, tmp_path)
    answering = load_model(tmp_path, {"answer_decoder.enable": True, "answer_decoder.num_layers": 2})
    state, source = answering.state_dict(), model.state_dict()
    copied = {
        "layer.0.attention.self.query.weight": "text_encoder.layer.2.attention.self.query.weight",
        "layer.1.output.dense.weight": "text_encoder.layer.3.output.dense.weight",
        "layer.1.crossattention.self.query.bias": "text_encoder.layer.3.crossattention.self.query.bias",
        "word_head.bias": "word_head.bias",
    }
    for ours, theirs in copied.items():
        assert torch.equal(state["answer_decoder." + ours], source[theirs]), ours
    keys = "layer.0.crossattention.self.key.weight"  # as wide as the visual there, as the question here
    same = state["answer_decoder." + keys].shape == source["text_encoder.layer.2" + keys[7:]].shape
    assert same == (width == 32)


def test_without_an_mlm_head_and_with_few_fusion_layers_the_rest_of_the_decoder_is_new(tmp_path):
    config = small_config(loss_weight=LossWeights(mlm=0.0))
    config.vision_encoder.width, config.vision_encoder.heads = 32, 2  # as wide as the text
    config.text_encoder.layers, config.text_encoder.fusion_layer = 4, 3
    model = Singularity(config, PAD, CLS, MASK)
    save_model(model, config, tmp_path)
    wanted = with_changes(config, {"answer_decoder.enable": True, "answer_decoder.num_layers": 2})
    answering = SingularityQA(wanted, PAD, CLS, MASK)
    report = fit_weights(answering, load_weights(tmp_path), "w")
    heads = {name for name in answering.state_dict() if name.startswith("answer_decoder.word_head.")}
    crossing = {name for name in answering.state_dict() if name.startswith("answer_decoder.layer.0.crossattention.")}
    assert set(report.fresh) == heads | crossing
    assert {name for name in answering.state_dict() if name.startswith("answer_decoder.")} - set(report.copied) == (
        heads | crossing
    )
    own = answering.state_dict()["answer_decoder.layer.0.attention.self.query.weight"]
    assert torch.equal(own, model.state_dict()["text_encoder.layer.2.attention.self.query.weight"])


def test_mlm_that_begins_later_has_a_new_head(tmp_path):
    config = small_config(loss_weight=LossWeights(mlm=0.0))
    save_model(Singularity(config, PAD, CLS, MASK), config, tmp_path)
    begun = Singularity(with_changes(config, {"loss_weight.mlm": 1.0}), PAD, CLS, MASK)
    report = fit_weights(begun, load_weights(tmp_path), "w")
    assert set(report.fresh) == {name for name in begun.state_dict() if name.startswith("word_head.")}


def foreign_weights(model):
    """The model's weights without its matching head, with a tensor of somebody else, and fewer words."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("itm_head.")}
    state["text_encoder.embeddings.position_embeddings.weight"] = torch.zeros(3, 32)
    return Weights(model.config, state | {"momentum.weight": torch.zeros(2)})


def test_tensors_that_do_not_fit_are_listed_unless_named_as_expected(model):
    positions = "text_encoder.embeddings.position_embeddings.weight"
    with pytest.raises(
        ValueError, match=r"missing: itm_head\.bias, itm_head\.weight; unexpected: momentum\.weight"
    ) as all_:
        fit_weights(model, foreign_weights(model), "w.pth")
    assert f"with another shape: {positions} (3, 32) for" in str(all_.value)
    assert "List tensors that may differ in expected_tensors" in str(all_.value)
    with pytest.raises(ValueError, match=r"w\.pth does not fit the model \(unexpected: momentum.weight\)"):
        fit_weights(model, foreign_weights(model), "w.pth", ["itm_head.*", positions])
    other = small_model(seed=5)
    own = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    report = fit_weights(other, foreign_weights(model), "w.pth", ["itm_head.*", positions, "momentum.*"])
    assert set(report.expected) == {"itm_head.bias", "itm_head.weight", positions, "momentum.weight"}
    for name, tensor in other.state_dict().items():
        source = own if name in report.expected else model.state_dict()
        assert torch.equal(tensor, source[name]), name


def test_expected_tensors_that_fit_are_an_error(model):
    weights = Weights(model.config, dict(model.state_dict()))
    with pytest.raises(
        ValueError, match=r"expected_tensors names 'itm_haed\.\*', but no such tensor of w\.pth is missing"
    ):
        fit_weights(model, weights, "w.pth", ["itm_haed.*"])


def test_impossible_changes_are_errors(saved):
    assert load_model(saved, {"loss_weight.mlm": 0.0}).word_head is None
    with pytest.raises(ValueError, match="vocabulary has 60 tokens in the checkpoint and 70 in the model"):
        load_model(saved, {"text_encoder.vocab_size": 70})
    with pytest.raises(ValueError, match=r"temporal_vision_encoder\.enable"):
        load_model(saved, {"temporal_vision_encoder.enabled": True})


def write_run(tmp_path, model, names):
    for name in names:
        save_model(model, model.config, tmp_path / "run" / "checkpoints" / name / "weights")
    return tmp_path / "run"


def test_a_run_folder_resolves_to_its_best_or_newest_complete_checkpoint(tmp_path, model):
    run = write_run(tmp_path, model, ["step_00000100", "step_00000200"])
    (run / "checkpoints" / "step_00000300" / "weights").mkdir(parents=True)
    assert resolve_weights(run).parent.name == "step_00000200"
    assert resolve_weights(run / "checkpoints" / "step_00000100").parent.name == "step_00000100"
    write_run(tmp_path, model, ["best"])
    assert resolve_weights(run).parent.name == "best"


@pytest.mark.parametrize(("name", "message"), [("nowhere", "nowhere does not exist: give a folder"), ("", "no model")])
def test_a_path_without_a_model_is_an_error(tmp_path, name, message):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileNotFoundError, match=message):
        load_model(tmp_path / name)


@pytest.mark.parametrize("settings", ["\0", "a: [", "video_input: null\n", "- 1\n", "max_q_len: 7\n"])
def test_weights_without_preprocessing_take_that_of_their_run_if_it_can_be_read(tmp_path, model, caplog, settings):
    run = write_run(tmp_path, model, ["best"])
    path = run / "checkpoints" / "best" / "weights" / "model.json"
    description = json.loads(path.read_text())
    del description["preprocessing"]
    path.write_text(json.dumps(description))
    (run / "config.yaml").write_text(settings)
    whole = settings.startswith("max_q_len")
    assert load_weights(run).preprocessing == (Preprocessing(max_q_len=7) if whole else Preprocessing())
    assert ("config.yaml cannot be read" in caplog.text) != whole


def test_missing_and_truncated_tensors_are_errors(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors has [\d,]+ bytes instead of [\d,]+: .*damaged"):
        load_model(saved)
    (saved / "model.safetensors").write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*truncated"):
        load_model(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(saved)


def test_a_damaged_or_foreign_description_is_an_error(saved):
    path = saved / "model.json"
    whole = path.read_text()
    for text, reason in (
        (whole[:50], "not valid JSON"),
        ('{"format": "other"}', "does not describe"),
        (whole.replace('"version": 1', '"version": 9'), "version 9"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            load_model(saved)
