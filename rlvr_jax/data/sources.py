"""Where problems come from: a file, or reasoning-gym tasks by name."""

from typing import Literal

from rlvr_jax.data.problems import Problem, read_problems
from rlvr_jax.data.shards import data_files
from rlvr_jax.data.tasks import check_tasks, is_tasks, read_tasks
from rlvr_jax.rewards.pool import RULES


def check_source(source: str, *, rule: str) -> None:
    """What can be said in no time of a source whose responses are to be graded by `rule`.

    Raises:
        ValueError: no such file; reasoning-gym is not installed; an unknown task or key; a rule that does not read the
            answers of this source.
    """
    if rule in RULES and (rule == "reasoning_gym") != is_tasks(source):
        raise ValueError(
            f"rule {rule!r} for the problems of {source}: expected 'reasoning_gym' for those of reasoning_gym:TASK, "
            "since it alone reads their answers, and for them alone"
        )
    if is_tasks(source):
        check_tasks(source)
    else:
        data_files(source)


def load_problems(
    source: str, *, prompt_suffix: str = "", deduplicate: Literal["none", "by_id"] = "none"
) -> list[Problem]:
    """`read_problems` of a file, or `read_tasks` of "reasoning_gym:..." (whose problems are all different).

    Raises:
        ValueError: as these two.
    """
    if is_tasks(source):
        return read_tasks(source, prompt_suffix=prompt_suffix)
    return read_problems(source, prompt_suffix=prompt_suffix, deduplicate=deduplicate)
