"""reasoning-gym tasks as problems and as graders (skipped without the package, but for the sentence that says so)."""

import importlib.util
import json
import sys

import pytest

from rlvr_jax.data.sources import check_source, load_problems
from rlvr_jax.data.tasks import SUFFIX, read_tasks
from rlvr_jax.rewards import Graded, GraderPool

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is an optional dependency"
)


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=1, timeout_s=30.0) as pool:
        yield pool


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"reasoning_gym:leg_counting: .*pip install reasoning-gym"):
        check_source("reasoning_gym:leg_counting", rule="reasoning_gym")


@needs_gym
def test_tasks_are_problems_with_stable_ids():
    problems = load_problems("reasoning_gym:leg_counting?size=3&seed=7")
    assert problems == read_tasks("reasoning_gym:leg_counting?seed=7&size=3")
    assert [p.index for p in problems] == [0, 1, 2]
    assert [p.id for p in problems] == ["leg_counting/7/0", "leg_counting/7/1", "leg_counting/7/2"]
    assert {p.data_source for p in problems} == {"reasoning_gym/leg_counting"}
    (message,) = problems[0].messages
    assert message["role"] == "user"
    assert "legs" in message["content"]
    assert message["content"].endswith(SUFFIX)
    asked = json.loads(problems[2].answer)
    assert (asked["task"], asked["index"], asked["config"]) == ("leg_counting", 2, {"size": 3, "seed": 7})
    other = load_problems("reasoning_gym:leg_counting?size=3&seed=8", prompt_suffix=" So?")
    assert [p.messages for p in other] != [p.messages for p in problems]
    assert other[0].messages[0]["content"].endswith(" So?")
    # the first problems are the same however many there are
    assert load_problems("reasoning_gym:leg_counting?size=2&seed=7")[1].messages == problems[1].messages


@needs_gym
def test_a_mixture_with_keys_for_all_and_for_one():
    problems = load_problems(
        "reasoning_gym:chain_sum,basic_arithmetic?size=4&seed=1&chain_sum.size=2&chain_sum.max_terms=3"
        '&basic_arithmetic.operators=["%2B"]'
    )
    assert [p.id.split("/")[0] for p in problems] == ["chain_sum"] * 2 + ["basic_arithmetic"] * 4
    assert [p.index for p in problems] == list(range(6))
    assert json.loads(problems[0].answer)["config"] == {"size": 2, "seed": 1, "max_terms": 3}
    assert json.loads(problems[2].answer)["config"] == {"size": 4, "seed": 1, "operators": ["+"]}


@needs_gym
@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("reasoning_gym:leg_countin", "no task 'leg_countin' in reasoning-gym, perhaps leg_counting"),
        ("reasoning_gym:", "no task ''"),
        ("reasoning_gym:composite", "no task 'composite'"),
        ("reasoning_gym:leg_counting,leg_counting", "named twice"),
        ("reasoning_gym:leg_counting?max_animal=3", "no key 'max_animal', perhaps max_animals"),
        ("reasoning_gym:leg_counting?chain_sum.size=3", "'chain_sum' is none of its tasks"),
        ("reasoning_gym:leg_counting?size", "expected key=value"),
        ("reasoning_gym:leg_counting?size=0", "size = 0: expected a whole number"),
        ("reasoning_gym:leg_counting?seed=x", "seed = 'x': expected a whole number"),
    ],
)
def test_bad_sources_are_named(source, part):
    with pytest.raises(ValueError, match=part):
        check_source(source, rule="reasoning_gym")


@needs_gym
def test_a_value_that_the_task_refuses():
    with pytest.raises(ValueError, match=r"leg_counting with .*min_animals"):
        load_problems("reasoning_gym:leg_counting?min_animals=9&max_animals=3")


@needs_gym
def test_source_and_rule_must_fit(tmp_path):
    with pytest.raises(ValueError, match="rule 'math_verify' for the problems of reasoning_gym:leg_counting"):
        check_source("reasoning_gym:leg_counting", rule="math_verify")
    with pytest.raises(ValueError, match=r"rule 'reasoning_gym' for the problems of x\.jsonl"):
        check_source("x.jsonl", rule="reasoning_gym")
    check_source("reasoning_gym:leg_counting", rule="my_module:my_function")


@needs_gym
def test_the_task_grades(pool):
    problem = load_problems("reasoning_gym:leg_counting?size=2&seed=1")[1]
    right = json.loads(problem.answer)["answer"]
    responses = [
        f"So <answer>{right}</answer>",
        f"\\boxed{{{right}}}",
        f"Answer: {right}",
        "<answer>-1</answer>",
        "what?",
    ]
    graded = pool.grade("reasoning_gym", responses, [problem.answer] * 5)
    assert graded[:3] == [Graded(True, right, None, 1.0)] * 3
    assert (graded[3].correct, graded[3].prediction, graded[3].error) == (False, "-1", None)
    assert graded[3].score < 1
    assert graded[4] == Graded(False, None, None, 0.0)
    assert [verdict.reward for verdict in graded[:1] + graded[4:]] == [1, 0]


@needs_gym
def test_many_right_answers_and_partial_marks(pool):
    (problem,) = load_problems("reasoning_gym:countdown?size=1&seed=3")
    asked = json.loads(problem.answer)
    reordered = f"({asked['answer']})"  # another text of the same value
    (graded,) = pool.grade("reasoning_gym", [f"<answer>{reordered}</answer>"], [problem.answer])
    assert (graded.correct, graded.score) == (True, 1.0)
    (part,) = pool.grade("reasoning_gym", ["<answer>1</answer>"], [problem.answer])
    assert not part.correct
    assert 0 <= part.score < 1


@needs_gym
def test_an_answer_of_another_kind_is_an_error(pool):
    (problem,) = load_problems("reasoning_gym:leg_counting?size=1&seed=1")
    changed = json.dumps(json.loads(problem.answer) | {"question_sha256": "0" * 16})
    plain, other = pool.grade("reasoning_gym", ["<answer>1</answer>"] * 2, ["42", changed])
    assert plain.error == "ValueError: the reference answer is not that of a reasoning-gym problem"
    assert other.error == "ValueError: leg_counting 0 is another question when it is made again"
    assert (plain.correct, plain.score, other.score) == (False, 0.0, 0.0)


@needs_gym
def test_tasks_that_depend_on_the_hash_seed_or_on_global_random_numbers(pool):
    problems = load_problems("reasoning_gym:ransom_note,list_functions,polynomial_multiplication?size=12&seed=1")
    responses = [f"<answer>{json.loads(p.answer)['answer']}</answer>" for p in problems]
    graded = pool.grade("reasoning_gym", responses, [p.answer for p in problems])
    assert [(p.id, verdict) for p, verdict in zip(problems, graded, strict=True) if verdict.score != 1] == []


@needs_gym
@pytest.mark.slow
def test_every_task_makes_its_problems_again_and_gives_its_own_answer_full_marks(pool):
    import reasoning_gym

    names = ",".join(name for name in reasoning_gym.factory.DATASETS if name != "composite")
    problems = load_problems(f"reasoning_gym:{names}?size=3&seed=5")
    own = [json.loads(p.answer)["answer"] for p in problems]
    graded = pool.grade("reasoning_gym", [f"<answer>{x}</answer>" for x in own], [p.answer for p in problems])
    assert [(p.id, v) for p, x, v in zip(problems, own, graded, strict=True) if v.error or (x and v.score != 1)] == []
