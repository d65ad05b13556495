"""`python -m train.config.page > docs/settings.md`: the page of all settings, made from their declarations."""

from __future__ import annotations

import json
import sys
from dataclasses import fields

from eval.config import EvalRunConfig
from loaders.config import LoaderConfig
from model.config import ModelSettings
from runtime.settings import ANY, EVALUATION, FINE_TUNING, FIXED, FREE, START, TRAINING, declarations, flatten
from train.config.settings import RunConfig

RESUMED = {FIXED: "no", EVALUATION: "yes", FREE: "yes"}
CHECKPOINT = {
    FINE_TUNING: "in fine-tuning",
    TRAINING: "in fine-tuning; no effect in evaluation",
    ANY: "yes",
    START: "no effect",
    None: "",
}
PARTS = {"Model": ModelSettings, "Data": LoaderConfig, "Evaluation": EvalRunConfig, "Run": RunConfig}
COLUMNS = "| key | default | resumed | checkpoint | meaning |\n|---|---|---|---|---|"
HEAD = """\
# Settings

Every key that a run's YAML or a `key=value` override may hold. This page is made from the code by
`python -m train.config.page > docs/settings.md`. How files and overrides are merged: [training](training.md).

- **resumed**: whether a resumed run may change the setting.
- **checkpoint**: where the model comes from a checkpoint (`pretrained_path`, `checkpoint`), whether the setting may
  differ from it. Empty: it must not, if it is a setting of the model.
"""


def page() -> str:
    """The page in Markdown: a table of settings for each part of RunConfig."""
    rows: dict[str, list[str]] = {title: [] for title in PARTS}
    defaults = flatten(RunConfig())
    for key, declared in declarations(RunConfig).items():
        choices = f" ({', '.join(declared.choices)})" if declared.choices else ""
        cells = [f"`{key}`", f"`{json.dumps(defaults[key])}`", RESUMED[declared.resumed or FIXED]]
        cells += [CHECKPOINT[declared.checkpoint], f"{declared.help}{choices}"]
        name = key.partition(".")[0]
        title = next(title for title, part in PARTS.items() if name in {item.name for item in fields(part)})
        rows[title].append("| " + " | ".join(cells) + " |")
    return "\n".join([HEAD, *("\n".join([f"## {title}\n", COLUMNS, *lines, ""]) for title, lines in rows.items())])


if __name__ == "__main__":
    sys.stdout.write(page())
