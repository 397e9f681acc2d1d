"""The demo's task: left-to-right arithmetic modulo 10, where errors come from bad reasoning choices.

A problem such as `8-5+3*6` is worked out step by step: `8-5=3`, `3+3=6`, `6*6=6`, each result modulo 10, then
`\\boxed{6}`. At every step the demonstrator either is *careful* (one operation, right 95% of the time) or *jumps*
(two operations at once, `8-5+3=?`, right 12% of the time, about chance). A base model that imitates a crowd of mostly
jumping demonstrators knows both ways; what reinforcement learning can change is the choice between them, one token a
step.

Each step opens with one of `fillers` letters that mean nothing. They put entropy where no decision is, which handicaps
criteria by entropy; `fillers=0` runs the study without them.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from rlvr_jax.data.problems import write_problems
from rlvr_jax.runs.files import atomic_path, write_json

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("user", "assistant", "\\boxed{")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Size of the problems and habits of the demonstrators (probabilities a step)."""

    operations: int = 5
    fillers: int = 6
    careful_right: float = 0.95
    jump_right: float = 0.12
    careful_people: float = 0.42  # share of demonstrators who are mostly careful
    careful_often: float = 0.95  # how often those are careful
    careful_rarely: float = 0.15  # how often the others are


@dataclasses.dataclass(frozen=True)
class Exercise:
    start: int
    steps: tuple[tuple[str, int], ...]  # (operator, operand)

    @property
    def text(self) -> str:
        return str(self.start) + "".join(f"{operator}{operand}" for operator, operand in self.steps)

    @property
    def answer(self) -> int:
        value = self.start
        for operator, operand in self.steps:
            value = apply_operator(value, operator, operand)
        return value


def apply_operator(value: int, operator: str, operand: int) -> int:
    """One operation modulo 10."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10


def draw_exercise(task: Task, rng: random.Random) -> Exercise:
    steps = tuple((rng.choice("+-*"), rng.randrange(10)) for _ in range(task.operations))
    return Exercise(rng.randrange(10), steps)


def demonstrate(exercise: Exercise, task: Task, rng: random.Random, careful: float) -> str:
    """One worked response; `careful` is the probability of taking a step alone rather than two at once."""
    text, value, left = "", exercise.start, list(exercise.steps)
    while left:
        alone = len(left) == 1 or rng.random() < careful
        taken, left = left[: 1 if alone else 2], left[1 if alone else 2 :]
        result = value
        for operator, operand in taken:
            result = apply_operator(result, operator, operand)
        if rng.random() >= (task.careful_right if alone else task.jump_right):
            result = (result + rng.randrange(1, 10)) % 10
        filler = chr(ord("a") + rng.randrange(task.fillers)) if task.fillers else ""
        text += f"{filler}{value}" + "".join(f"{operator}{operand}" for operator, operand in taken) + f"={result}"
        value = result
    return text + f"\\boxed{{{value}}}"


def conversations(task: Task, count: int, seed: int, *, clean: bool) -> Iterator[dict]:
    """Supervised rows: `clean` shows careful demonstrators without slips, otherwise the mixed crowd."""
    rng = random.Random(seed)
    shown = dataclasses.replace(task, careful_right=1.0) if clean else task
    for _ in range(count):
        exercise = draw_exercise(task, rng)
        habit = 1.0 if clean else task.careful_often if rng.random() < task.careful_people else task.careful_rarely
        response = demonstrate(exercise, shown, rng, habit)
        yield {
            "messages": [
                {"role": "user", "content": exercise.text},
                {"role": "assistant", "content": response},
            ]
        }


def problem_rows(task: Task, count: int, seed: int, *, exclude: frozenset[str] = frozenset()) -> list[dict]:
    """Distinct problems in the published parquet schema (prompt, reward_model.ground_truth, ...)."""
    rng = random.Random(seed)
    rows: list[dict] = []
    seen = set(exclude)
    while len(rows) < count:
        exercise = draw_exercise(task, rng)
        if exercise.text in seen:
            continue
        seen.add(exercise.text)
        rows.append(
            {
                "data_source": "left_to_right_mod_10",
                "prompt": [{"role": "user", "content": exercise.text}],
                "ability": "MATH",
                "reward_model": {"style": "rule", "ground_truth": str(exercise.answer)},
                "extra_info": {"index": str(len(rows)), "split": f"seed{seed}"},
            }
        )
    return rows


def make_tokenizer(task: Task) -> Tokenizer:
    """A character tokenizer with the special tokens of Qwen's form."""
    letters = [chr(ord("a") + i) for i in range(max(task.fillers, 1))]
    vocabulary = ["\n", *"0123456789+-*=}", *letters]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def model_config(vocab_size: int) -> dict:
    """config.json of the demo's model: a Qwen3 of about 220 thousand parameters."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "initializer_range": 0.05,
        "torch_dtype": "float32",
    }


def write_task(folder: Path, task: Task, *, clean_rows: int, mixed_rows: int, train: int, test: int) -> None:
    """Everything that the programs read: `init/` (config and tokenizer), supervised JSONL, problem parquet files."""
    tokenizer = make_tokenizer(task)
    with atomic_path(folder / "init" / "tokenizer.json") as path:
        tokenizer.save(str(path))
    write_json(folder / "init" / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "init" / "config.json", model_config(tokenizer.get_vocab_size()))
    for name, rows in (
        ("clean", conversations(task, clean_rows, 1, clean=True)),
        ("mixed", conversations(task, mixed_rows, 2, clean=False)),
    ):
        with atomic_path(folder / f"{name}.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    test_rows = problem_rows(task, test, 3)
    held_out = frozenset(row["prompt"][0]["content"] for row in test_rows)
    write_problems(folder / "train.parquet", problem_rows(task, train, 4, exclude=held_out))
    write_problems(folder / "test.parquet", test_rows)  # last: its presence says that all is there
