"""Evaluation: retrieval, question answering, multiple choice, metrics and reports."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.config import EvalConfig, EvalRunConfig
    from eval.features import encode_test_set, evaluating, match_marked, missing_visuals
    from eval.outcomes import Outcomes
    from eval.outputs import SplitOutput
    from eval.run import TASKS
    from eval.tasks.task import Task, TaskResult

__all__ = [
    "TASKS",
    "EvalConfig",
    "EvalRunConfig",
    "Outcomes",
    "SplitOutput",
    "Task",
    "TaskResult",
    "encode_test_set",
    "evaluating",
    "match_marked",
    "missing_visuals",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: settings and reports are read without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'eval' has no attribute {name!r}")
    from eval.config import EvalConfig, EvalRunConfig  # noqa: F401
    from eval.features import encode_test_set, evaluating, match_marked, missing_visuals  # noqa: F401
    from eval.outcomes import Outcomes  # noqa: F401
    from eval.outputs import SplitOutput  # noqa: F401
    from eval.run import TASKS  # noqa: F401
    from eval.tasks.task import Task, TaskResult  # noqa: F401

    globals().update({key: value for key, value in locals().items() if key in __all__})
    return globals()[name]
