"""The shape of the house: who may import whom, how long a file may be, what `import rlvr_jax` gives."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlvr_jax

ROOT = Path(__file__).parent.parent
PACKAGES = ("rlvr_jax", "train", "decode", "demo")
PURE = {"jax", "numpy", "math", "functools", "dataclasses", "typing", "collections", "fractions", "rlvr_jax.typing"}


def sources(*parts: str) -> list[Path]:
    path = ROOT.joinpath(*parts)
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert found, f"nothing at {path}"
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        (("rlvr_jax",), ("train", "decode", "demo", "configs")),
        (("train",), ("decode", "demo", "configs")),
        (("decode",), ("train", "demo", "configs")),
        (("rlvr_jax", "models"), ("rlvr_jax.decoding", "rlvr_jax.objectives", "rlvr_jax.direction")),
        (("rlvr_jax", "decoding"), ("rlvr_jax.models", "flax")),
        (("rlvr_jax", "runs"), ("rlvr_jax.models", "rlvr_jax.decoding", "rlvr_jax.objectives", "rlvr_jax.dapo")),
        (PACKAGES[:1], ("torch",)),
    ],
)
def test_dependencies_run_one_way(importer, forbidden):
    for path in sources(*importer):
        wrong = [name for name in imports(path) for package in forbidden if inside(name, package)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize(
    ("module", "own"),
    [
        ("direction.py", {"checks"}),
        ("scatter.py", set()),
        ("top_logprobs.py", {"checks", "direction"}),
        ("criteria.py", {"checks", "direction", "entries", "top_logprobs"}),
        ("objectives", {"checks", "direction", "entries", "objectives", "scatter", "sharding"}),
        ("dapo.py", {"entries", "objectives", "sharding"}),
    ],
)
def test_the_formulas_import_jax_alone(module, own):
    allowed = PURE | {f"rlvr_jax.{name}" for name in own}
    for path in sources("rlvr_jax", module):
        wrong = {name for name in imports(path) if not any(inside(name, one) for one in allowed)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_map_tells_the_length_of_the_core():
    """docs/code.md: every file is there, about as long as it says, and together they are short."""
    text = (ROOT / "docs" / "code.md").read_text()
    listed = {path: int(lines) for path, lines in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", text, re.MULTILINE)}
    assert len(listed) >= 19
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in listed}
    assert {path: n for path, n in lengths.items() if abs(n - listed[path]) > 15} == {}
    assert sum(lengths.values()) <= 4500
    for path in re.findall(r"`([\w/]+\.(?:py|md))`", text):
        assert (ROOT / path).is_file() or (ROOT / "rlvr_jax" / path).is_file(), path


def test_importing_the_library_loads_no_tool():
    tools = ("rlvr_jax.microscope", "rlvr_jax.planning", "matplotlib", "orbax", "train", "decode")
    program = f"import rlvr_jax, sys; print(sorted(set({tools}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_read_in_one_sitting():
    for package in (*PACKAGES, "benchmarks", "tests", "configs"):
        for path in sources(package):
            assert len(path.read_text().splitlines()) <= 400, f"{path.relative_to(ROOT)} is too long"


SIGNATURES = {
    "load_hf": ["path", "*dtype", "*mesh", "*rules"],
    "save_hf": ["path", "config", "params", "*tokenizer", "*dtype", "*max_shard_bytes"],
    "token_logprobs": ["logits_BTV", "targets_BT", "*temperature"],
    "chunked_logprobs": ["hidden_BTD", "unembed_DV", "targets_BT", "*temperature", "*chunk", "*entropy"],
    "delta_logp": ["logp_base", "logp_rl"],
    "fires": ["criterion", "logp_base_BV", "logp_rl_BV", "token_B", "tau", "key"],
    "extrapolate": ["logp_base_BV", "logp_rl_BV", "gamma"],
    "sample": ["logits_BV", "keys_B", "*temperature", "*top_p", "*top_k"],
    "filtered_logprobs": ["logits_BV", "*temperature", "*top_p", "*top_k"],
    "group_advantages": ["scores_B", "group_B", "*normalize_by_std", "*epsilon", "*num_groups"],
    "reweight": ["kind", "advantages_BT", "old_logp_BT", "mask_BT", "*alpha", "*where", "*group_B", "*key"],
    "token_mask": ["kind", "mask_BT", "*quantile", "*old_logp_BT", "*entropy_BT", "*ref_logp_BT"],
    "policy_loss": ["logp_BT", "old_logp_BT", "advantages_BT", "mask_BT", "*clip_low", "*clip_high", "*clip_dual"],
    "gspo_loss": ["logp_BT", "old_logp_BT", "advantages_BT", "mask_BT", "*clip_low", "*clip_high"],
    "cispo_loss": ["logp_BT", "old_logp_BT", "advantages_BT", "mask_BT", "*clip_low", "*clip_high"],
    "kl_penalty": ["logp_BT", "ref_logp_BT", "mask_BT"],
    "importance_weights": ["old_logp_BT", "rollout_logp_BT", "mask_BT", "*kind", "*cap"],
    "aggregate": ["values_BT", "mask_BT", "mode"],
    "overlong_penalty": ["length_B", "*max_response", "*buffer", "*factor"],
    "math_verify_reward": ["responses", "answers"],
    "dapo_answer_reward": ["responses", "answers"],
    "generate": [
        "config", "params", "prompts", "*max_new_tokens", "*n", "*temperature", "*top_p", "*top_k", "*seed",
        "*stop_tokens", "*mesh",
    ],
    "generate_selective": [
        "config_base", "params_base", "config_rl", "params_rl", "prompts", "*criterion", "*tau", "*gamma",
        "*sample_from", "*block", "*max_new_tokens", "*n", "*temperature", "*top_p", "*top_k", "*seed", "*stop_tokens",
        "*mesh",
    ],
    "make_mesh": ["data", "fsdp", "tensor"],
    "make_train_step": ["apply", "optimizer", "loss_fn", "*micro_batches"],
}  # fmt: skip
NAMES = {
    *SIGNATURES, "QwenConfig", "Qwen", "entropy", "kl_divergence", "js_average", "js_divergence", "avg_at_k",
    "pass_at_k", "maj_at_k", "Generation", "Graded", "ShardingRules", "constrain", "TrainState",
}  # fmt: skip


def test_the_public_list():
    assert set(rlvr_jax.__all__) >= NAMES
    for name in rlvr_jax.__all__:
        assert getattr(rlvr_jax, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", SIGNATURES)
def test_argument_names_stay(name):
    parameters = inspect.signature(getattr(rlvr_jax, name)).parameters.values()
    got = [("*" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in parameters]
    listed = SIGNATURES[name]
    positional = [name for name in listed if not name.startswith("*")]
    assert got[: len(positional)] == positional
    assert set(got) >= set(listed)
    assert all(p.default is not p.empty for p, name in zip(parameters, got, strict=True) if name not in listed)
