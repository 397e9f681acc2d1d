"""Where problems come from: files, or reasoning-gym tasks by name."""

import logging
from typing import Literal

from rlvr_jax.data.problems import Problem, read_problems
from rlvr_jax.data.shards import Source, data_files, names
from rlvr_jax.data.tasks import check_tasks, is_tasks, read_tasks
from rlvr_jax.rewards import rules, sandbox
from rlvr_jax.rewards.pool import RULES

log = logging.getLogger(__name__)


def check_source(source: Source, *, rule: str, unsafe_evaluation: bool = False) -> None:
    """What can be said in no time of a source whose responses are to be graded by `rule`.

    Raises:
        ValueError: no such file; reasoning-gym is not installed; an unknown task or key; a rule that does not read the
            answers of this source; a task whose scorer evaluates the text of an answer, where there is no sandbox to do
            it in and `unsafe_evaluation` does not allow it.
    """
    if rule in RULES and (rule == "reasoning_gym") != is_tasks(source):
        raise ValueError(
            f"rule {rule!r} for the problems of {names(source)}: expected 'reasoning_gym' for those of "
            "reasoning_gym:TASK, since it alone reads their answers, and for them alone"
        )
    if is_tasks(source):
        tasks = [task for task, _ in check_tasks(str(source))]
        if rule == "reasoning_gym" and (missing := sandbox.unavailable()) is not None:
            _check_evaluation(str(source), tasks, missing, unsafe_evaluation)
    else:
        data_files(source)


def _check_evaluation(source: str, tasks: list[str], missing: str, unsafe_evaluation: bool) -> None:
    evaluating = ", ".join(task for task in tasks if task in rules.EVALUATING_TASKS)
    if evaluating and not unsafe_evaluation:
        raise ValueError(
            f"{source}: the scorers of {evaluating} evaluate the text of an answer, and there is no sandbox here "
            f"({missing}): leave these tasks out, or set unsafe_evaluation, with which text that the model wrote may "
            "run as code with all your rights"
        )
    what = f"{evaluating} evaluate the text of answers" if evaluating else "the tasks score answers"
    log.warning("%s: %s without a sandbox (%s)", source, what, missing)


def load_problems(
    source: Source,
    *,
    prompt_suffix: str = "",
    deduplicate: Literal["none", "by_id"] = "none",
    prompt_column: str = "",
    answer_column: str = "",
) -> list[Problem]:
    """`read_problems` of files, or `read_tasks` of "reasoning_gym:..." (whose problems are all different).

    Raises:
        ValueError: as these two.
    """
    if is_tasks(source):
        return read_tasks(str(source), prompt_suffix=prompt_suffix)
    return read_problems(
        source,
        prompt_suffix=prompt_suffix,
        deduplicate=deduplicate,
        prompt_column=prompt_column,
        answer_column=answer_column,
    )
