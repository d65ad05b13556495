"""The words that start a command: `singularity verify` or `python -m sharding.verify`, as the user started this one."""

from __future__ import annotations

import re

subcommands: dict[str, str] = {}  # module -> subcommand of `singularity`, which fills it


def command_line(module: str) -> str:
    """The words that start a module of ours, such as sharding.verify."""
    return f"singularity {subcommands[module]}" if module in subcommands else f"python -m {module}"


def as_started(text: str) -> str:
    """A message that names commands of ours in the way the user started this one."""

    def replaced(found: re.Match[str]) -> str:
        module = found[1] or f"launch.{found[2]}"
        return command_line(module) if module in subcommands else found[0]

    return re.sub(r"python -m ([a-z_.]*[a-z])|(?<![\w./-])launch/(\w+)\.py(?!\.?\w)", replaced, text)
