"""The configuration of a decoding run: what is refused, names, grids, and the controls that go with them."""

import dataclasses
import re
from pathlib import Path

import pytest

from decode.config import Controls, DecodeConfig, Grid, Setting
from decode.settings.sweep import resolve
from rlvr_jax.criteria import CRITERIA
from rlvr_jax.runs.program import parse_config, read_config

PAIR = DecodeConfig(base="b", rl="r", problems="p.jsonl", setting=Setting(criterion="delta_logp", tau=-0.3, gamma=0.05))


def change(config: DecodeConfig, **values) -> DecodeConfig:
    """`replace`, where the names of Setting change the single setting."""
    inner = {key: values.pop(key) for key in list(values) if key in Setting.__dataclass_fields__}
    setting = dataclasses.replace(values.pop("setting", config.setting), **inner)
    return dataclasses.replace(config, setting=setting, **values)


def test_a_single_setting_is_resolved():
    (setting,) = resolve(PAIR).settings
    assert setting == Setting("delta_logp_tau-0.3_gamma0.05_t1_p0.7", "pair", "delta_logp", -0.3, 0.05)
    alone = DecodeConfig(rl="r", problems="p.jsonl")
    assert resolve(alone).settings[0].model == "rl"
    assert resolve(change(PAIR, criterion=None, tau=None, gamma=0.0, model="base")).settings[0].model == "base"
    assert resolve(change(PAIR, criterion="none", tau=None)).settings[0].model == "pair"  # needs no threshold
    assert resolve(resolve(PAIR)) == resolve(PAIR)


@pytest.mark.parametrize(
    ("recipe", "tau", "gamma"), [("dapo_32b", -0.3, 0.05), ("orz_32b", -0.4, 0.1), ("unireason_14b", -0.35, 0.1)]
)
def test_the_published_recipes(recipe, tau, gamma):
    config = resolve(read_config(DecodeConfig, Path(__file__).parent.parent / "configs" / f"decode_{recipe}.py"))
    extrapolate, *others = config.settings
    assert (extrapolate.criterion, extrapolate.tau, extrapolate.gamma) == ("delta_logp", tau, gamma)
    assert (extrapolate.sample_from, extrapolate.temperature, extrapolate.top_p) == ("base", 1.0, 0.7)
    assert {other.control_of for other in others} == {(extrapolate.name,)}
    assert [(o.role, o.model, o.criterion, o.tau, o.gamma, o.temperature) for o in others] == [
        ("gamma0", "pair", "delta_logp", tau, 0.0, 1.0),
        ("abs_delta_logp", "pair", "abs_delta_logp", -tau, gamma, 1.0),
        ("rl", "rl", None, None, 0.0, 1.0),
        ("temperatures", "rl", None, None, 0.0, 0.3),
        ("temperatures", "rl", None, None, 0.0, 0.6),
        ("temperatures", "rl", None, None, 0.0, 0.0),
        ("base", "base", None, None, 0.0, 1.0),
    ]
    assert (len(config.seeds), config.n, config.max_new_tokens) == (8, 4, 20_000)
    assert config.prompt_suffix.endswith("final answer within \\boxed{}.")
    assert resolve(config) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": None, "rl": None}, "no model"),
        ({"problems": ""}, "problems='': expected a problem file, --problems"),
        ({"n": 0}, "n=0: expected 1 to 1,000,000"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4': expected one of model, int8"),
        ({"share": 0.1}, "share=0.1 and tau=-0.3: expected only one"),
        ({"tau": None, "share": 1.0}, "share=1.0: expected above 0 and below 1"),
        ({"match_rate": (0.1,)}, "tau=-0.3: the grid says that"),
        ({"criterion": None, "tau": None, "match_rate": (0.1,)}, "match_rate: expected --criterion"),
        ({"seeds": (2**31,)}, "seeds has 2147483648: expected 0 to 2,147,483,647"),
        ({"criterion": "all"}, "tau=-0.3: criterion all looks at no threshold"),
        ({"graders": ("maths",)}, "graders has 'maths': expected one of math_verify, dapo_answer"),
        ({"tau": None}, "tau missing: criterion delta_logp needs a threshold"),
        ({"criterion": "dlogp"}, "criterion='dlogp': expected one of delta_logp, "),
        ({"criterion": None}, "criterion missing"),
        ({"rl": None}, "model 'pair' needs --rl"),
        ({"model": "rl"}, "belong to model 'pair'"),
        ({"name": "../x"}, "name='../x': expected letters, digits and . _ + -"),
        ({"settings": (Setting("a", "rl"), Setting("a", "base")), "setting": Setting()}, "'a' occurs twice"),
        ({"settings": (Setting("a", "rl"),)}, "--settings.0.tau"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(change(PAIR, **values))


def parsed(*flags: str) -> DecodeConfig:
    words = ["--base", "b", "--rl", "r", "--problems", "p.jsonl", *flags]
    return resolve(parse_config(DecodeConfig, words, prog="decode", description=""))


def names(config: DecodeConfig, *roles: str) -> list[str]:
    return [setting.name for setting in config.settings if setting.role in roles]


def test_a_grid_on_the_command_line():
    config = parsed(
        *("--grid.criteria", "delta_logp", "kl", "none", "--grid.taus", "delta_logp=-0.3", "delta_logp=-.5", "kl=0.1"),
        *("--grid.gammas", "0", "0.05", "--grid.sample-from", "base", "rl", "--top-p", "1", "--controls.on", "False"),
    )
    made = [name.removesuffix("_t1_p1") for name in names(config, "setting")]
    assert len(made) == len(config.settings) == 2 * 2 * 2 + 2 * 2 + 2 * 2
    assert made[:4] == [f"delta_logp_tau{tau}_gamma{gamma}" for tau in ("-0.3", "-0.5") for gamma in ("0", "0.05")]
    assert made[6:10] == [
        *("delta_logp_tau-0.5_gamma0_from-rl", "delta_logp_tau-0.5_gamma0.05_from-rl"),
        *("kl_tau0.1_gamma0", "kl_tau0.1_gamma0.05"),
    ]
    assert next(name for name in made if name.startswith("none")) == "none_gamma0"
    assert {setting.top_p for setting in config.settings} == {1.0}
    plain = parsed("--grid.criteria", "delta_logp", "--grid.taus", "-0.3", "-0.5", "--grid.gammas", "0.05")
    assert [setting.tau for setting in plain.settings if setting.role == "setting"] == [-0.3, -0.5]


def test_a_match_rate_instead_of_taus():
    config = parsed("--grid.criteria", "delta_logp", "random", "--match-rate", "0.05", "0.1", "--controls.on", "False")
    assert [(s.criterion, s.share, s.tau) for s in config.settings] == [
        *(("delta_logp", 0.05, None), ("delta_logp", 0.1, None)),
        *(("random", 0.05, None), ("random", 0.1, None)),
    ]
    assert config.settings[0].name == "delta_logp_share0.05_gamma0_t1_p0.7"
    single = parsed("--criterion", "kl", "--match-rate", "0.05", "--gamma", "0.1", "--sample-from", "rl")
    setting = single.settings[0]
    assert (setting.criterion, setting.share, setting.gamma, setting.sample_from) == ("kl", 0.05, 0.1, "rl")


def test_every_sweep_has_its_controls_once():
    config = parsed("--grid.criteria", "delta_logp", "kl", "--match-rate", "0.05", "--grid.gammas", "0", "0.05", "0.1")
    assert names(config, "setting") == [
        f"{criterion}_share0.05_gamma{gamma}_t1_p0.7"
        for criterion in ("delta_logp", "kl")
        for gamma in ("0", "0.05", "0.1")
    ]
    by_name = {setting.name: setting for setting in config.settings}
    # gamma = 0 was asked for: it is marked and not run twice
    redraw = by_name["kl_share0.05_gamma0_t1_p0.7"]
    assert redraw.role == "setting"
    assert redraw.control_of == ("kl_share0.05_gamma0.05_t1_p0.7", "kl_share0.05_gamma0.1_t1_p0.7")
    assert names(config, "gamma0") == []
    assert names(config, "abs_delta_logp") == [
        f"abs_delta_logp_share0.05_gamma{g}_t1_p0.7" for g in ("0", "0.05", "0.1")
    ]
    assert by_name["abs_delta_logp_share0.05_gamma0.1_t1_p0.7"].control_of == ("delta_logp_share0.05_gamma0.1_t1_p0.7",)
    assert names(config, "rl", "base", "temperatures") == [
        *("rl_t1_p0.7", "rl_t0.3_p0.7", "rl_t0.6_p0.7", "rl_t0_p0.7", "base_t1_p0.7"),
    ]
    assert by_name["rl_t0_p0.7"].control_of == tuple(names(config, "setting"))
    # only a positive gamma needs the redraw alone, and only delta_logp has a form without direction
    few = parsed("--grid.criteria", "kl", "--grid.taus", "0.1", "--controls.skip", "base", "temperatures")
    assert names(few, "gamma0", "abs_delta_logp", "base", "temperatures") == []
    assert names(few, "rl") == ["rl_t1_p0.7"]
    other = parsed(
        *("--grid.criteria", "delta_logp", "--grid.taus", "-0.3", "--grid.gammas", "0.05", "--temperature", "0.6"),
        *("--controls.temperatures", "0.6", "1"),
    )
    assert names(other, "gamma0", "abs_delta_logp") == [
        "delta_logp_tau-0.3_gamma0_t0.6_p0.7",
        "abs_delta_logp_tau0.3_gamma0.05_t0.6_p0.7",
    ]
    assert names(other, "rl", "temperatures") == ["rl_t0.6_p0.7", "rl_t1_p0.7"]


def test_controls_of_listed_settings_on_demand():
    listed = change(PAIR, setting=Setting(), settings=(PAIR.setting, Setting("mine", "rl")))
    assert len(resolve(listed).settings) == 2
    config = resolve(dataclasses.replace(listed, controls=Controls(True, ("temperatures",))))
    assert names(config, "setting") == ["delta_logp_tau-0.3_gamma0.05_t1_p0.7", "mine"]
    assert config.settings[1].control_of == (config.settings[0].name,)  # it is rl alone, under another name
    assert names(config, "gamma0", "abs_delta_logp", "rl", "base") == [
        *("delta_logp_tau-0.3_gamma0_t1_p0.7", "abs_delta_logp_tau0.3_gamma0.05_t1_p0.7", "base_t1_p0.7"),
    ]
    assert resolve(config) == config
    for mine, message in (
        (Setting("rl_t1_p0.7", "rl", temperature=0.5), "the name 'rl_t1_p0.7' occurs twice"),
        (dataclasses.replace(PAIR.setting, name="mine"), "'mine' is 'delta_logp_tau-0.3_gamma0.05_t1_p0.7' again"),
    ):
        config = change(PAIR, setting=Setting(), settings=(PAIR.setting, mine), controls=Controls(True))
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve(config)


@pytest.mark.parametrize(
    ("grid", "rates", "message"),
    [
        (Grid(("kl",)), (), "no tau for kl; give --grid.taus kl=NUMBER"),
        (Grid(("kl", "delta_logp"), ("-0.3",)), (), "grid.taus has '-0.3': kl is never negative"),
        (Grid(("kl",), ("js=1",)), (), "grid.taus has 'js=1': 'js' is not in grid.criteria"),
        (Grid(("kl",), ("kl=nan",)), (), "tau=nan: expected -10000 to 10000"),
        (Grid(("kl",), ("kl=x",)), (), "grid.taus has 'kl=x': expected a number or criterion=number"),
        (Grid(("kl",), ("1",)), (0.1,), "grid.taus and match_rate"),
        (Grid(("kl",), ("1",), (0.1, 0.1)), (), "grid.gammas=(0.1, 0.1)"),
        (Grid((), ("1",)), (), "--grid.criteria is missing"),
        (Grid(("kl",)), (0.0,), "match_rate has 0.0: expected above 0 and below 1"),
        (Grid(("kl",), ("0.1", "kl=0.1")), (), "occurs twice"),
        (
            Grid(("none", "all")),
            (0.1,),
            "match_rate=(0.1,): none of grid.criteria=('none', 'all') looks at a thresh",
        ),
        (Grid(("all",), ("0.1",)), (), "grid.taus=('0.1',): none of grid.criteria=('all',)"),
    ],
)
def test_bad_grids_are_named(grid, rates, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(DecodeConfig(base="b", rl="r", problems="p", grid=grid, match_rate=rates))


def test_the_help_lists_the_criteria(capsys):
    with pytest.raises(SystemExit):
        parse_config(DecodeConfig, ["--help"], prog="decode", description="")
    text = capsys.readouterr().out
    assert "--grid.criteria" in text
    assert all(criterion in text for criterion in CRITERIA)
    assert "--role" not in text
    with pytest.raises(ValueError, match=r"grid\.criteria has 'dlogp': expected one of delta_logp, "):
        parsed("--grid.criteria", "dlogp")


def test_a_criterion_of_one_s_own():
    """By name; where a threshold of either sign has a meaning, since nothing is known of its values."""
    config = parsed("--criterion", "tests.own_functions:surprise", "--tau", "-0.5")
    assert names(config, "setting") == ["tests.own_functions.surprise_tau-0.5_gamma0_t1_p0.7"]
    parsed(
        "--grid.criteria",
        "tests.own_functions:surprise",
        "kl",
        "--grid.taus",
        "tests.own_functions:surprise=-1",
        "kl=0.1",
    )
    for wrong, message in {
        "tests.own_functions:nothing": "cannot be imported: .*nothing",
        "tests.no_such_module:f": "cannot be imported: No module",
        "tests.own_functions:__name__": "expected a Criterion or a function, got a str",
    }.items():
        with pytest.raises(ValueError, match=f"criterion='{wrong}': {message}"):
            parsed("--criterion", wrong, "--tau", "0.5")
    with pytest.raises(ValueError, match=r"every_other: failed on a tiny batch: TypeError"):
        parsed("--criterion", "tests.own_functions:every_other", "--tau", "0.5")
    with pytest.raises(ValueError, match="has no published form"):
        parsed("--criterion", "tests.own_functions:surprise", "--tau", "0.5", "--top-logprobs", "5")
