"""The model card of the hub, made of a run: data, frames, protocol, numbers, licence, and how to load the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.checkpoints.files import find_run
from model.config import ModelConfig
from model.history import History
from preprocessing.config import Preprocessing

HEAD = """---
license: mit
library_name: singularity-at-scale
pipeline_tag: {pipeline}
tags:
- singularity
- video-text
- image-text
---

# {title}

A vision-and-language model, {what}, after Lei, Berg and Bansal,
[Revealing Single Frame Bias for Video-and-Language Learning](https://arxiv.org/abs/2206.03428).

```python
from model import {kind}

model = {kind}.from_pretrained("USER/NAME")  # this repository
{use}
```
"""
USE = """images = model.encode_images(["photo.jpg"])  # (1, {width})
texts = model.encode_texts(["a dog in the snow", "two cats"])  # (2, {width})
print(images @ texts.T, model.match(["photo.jpg"], ["a dog in the snow", "two cats"]))"""
USE_QA = 'print(model.answer(["photo.jpg"], ["what animal is it"], ["dog", "cat"]))'


def model_card(config: ModelConfig, preprocessing: Preprocessing, history: History, source: Path | None) -> str:
    """The card, Markdown, of a model whose weights were found at `source`; results are those of its run."""
    asks = config.answer_decoder.enable
    run = find_run(source) if source is not None else None
    head = HEAD.format(
        pipeline="visual-question-answering" if asks else "feature-extraction",
        title=run.name if run is not None else "Singularity",
        what="which answers questions about images and clips" if asks else "a dual encoder and a cross-encoder",
        kind="SingularityQA" if asks else "Singularity",
        use=USE_QA if asks else USE.format(width=config.embed_dim),
    )
    parts = [head, _model(config, preprocessing, history), *_data(preprocessing), *_results(run)]
    return "\n".join([*parts, "## Licence\n\nMIT, for code and weights. The data have their own licences.\n"])


def _model(config: ModelConfig, preprocessing: Preprocessing, history: History) -> str:
    temporal = "with" if config.temporal_vision_encoder.enable else "without"
    vision, text = config.vision_encoder, config.text_encoder
    rows = {
        "vision": f"{vision.type}, {vision.depth} layers of width {vision.width}, {config.image_res} pixels",
        "text": f"{text.layers} layers of width {text.width}, fusion from layer {text.fusion_layer} on",
        **({"training started from": history.origin} if history.origin else {}),
        "frames in training": f"{config.num_frames}, {temporal} a temporal encoder",
        "frames in evaluation": f"{preprocessing.num_frames_test} ({preprocessing.sample_type_test})",
    }
    return _table("Model", ["part", "value"], [[key, value] for key, value in rows.items()])


def _data(preprocessing: Preprocessing) -> Iterator[str]:
    """The corpora of the last training; earlier ones, of the weights that it started from, are not known."""
    rows = [
        [each.name, each.media_type, f"{each.samples:,}", f"{each.captions or each.questions:,}"]
        for each in preprocessing.corpora
    ]
    if rows:
        yield _table("Training data", ["corpus", "medium", "samples", "texts"], rows)


def _results(run: Path | None) -> Iterator[str]:
    """The metrics of the run's evaluations, the newest of each label last."""
    found = [] if run is None else [each.parent for each in run.glob("evaluation/*/evaluation.json")]
    for folder in sorted(found, key=lambda each: _json(each / "evaluation.json").get("created", "")):
        if folder.name.startswith("epoch_"):
            continue
        about, metrics = _json(folder / "evaluation.json"), _json(folder / "metrics.json")
        names = list(dict.fromkeys(name for values in metrics.values() for name in values))
        rows = [
            [entry.rstrip("/"), *(f"{values[name]:g}" if name in values else "" for name in names)]
            for entry, values in metrics.items()
        ]
        settings = about.get("settings", {})
        used = [f"{key}={settings[key]}" for key in ("k_test", "eval_frame_ensemble", "precision") if key in settings]
        protocol = f"Zero-shot: {'yes' if about.get('zero_shot') else 'no'}. Settings: {', '.join(used)}. In percent.\n"
        for split, details in about.get("splits", {}).items():
            frames = details["num_frames"]
            size = (
                f"{details['num_visuals']:,} {details['media_type']}s, {frames} frame{'s' if frames > 1 else ''} each"
            )
            protocol += f"- {split}: {size}\n"
        yield _table(f"Results: {about.get('task', '')}, {folder.name}", ["split", *names], rows) + "\n" + protocol


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
