"""From what the command line or a recipe asks for to the list of settings that are run: grids and their controls."""

import dataclasses
from collections.abc import Sequence
from typing import cast, get_args

from decode.config import (
    Control,
    DecodeConfig,
    Grid,
    Role,
    Setting,
    check_run,
    resolve_setting,
    unmarked,
)
from rlvr_jax.criteria import criterion_of


def resolve(config: DecodeConfig) -> DecodeConfig:
    """The same configuration with `settings` filled in: grid and controls expanded, every name and model explicit.

    Raises:
      ValueError: one sentence naming the key, the value and what was expected.
    """
    check_run(config)
    asked = [*config.settings, *_from_grid(config)]
    if not asked:
        asked = [config.setting]
    elif config.settings and config.setting != Setting():
        raise ValueError(
            "the config lists `settings`, so single-setting values such as --tau have no effect; "
            "give --settings.0.tau and so on"
        )
    settings = [resolve_setting(config, setting) for setting in asked]
    _check_names(settings)
    on = bool(config.grid.criteria or config.match_rate) if config.controls.on is None else config.controls.on
    # What is resolved once must stay as it is: controls that were added already are not asked for again.
    if on and all(setting.role == "setting" for setting in settings):
        settings = _with_controls(config, settings)
        _check_names(settings)
    return dataclasses.replace(config, settings=tuple(settings), setting=Setting(), grid=Grid(), match_rate=())


def _check_names(settings: Sequence[Setting]) -> None:
    names = [setting.name for setting in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"settings: the name {twice[0]!r} occurs twice; give each setting its own name")


def _from_grid(config: DecodeConfig) -> list[Setting]:
    grid, single = config.grid, config.setting
    if config.match_rate and not grid.criteria:
        if single.criterion is None:
            raise ValueError("match_rate: expected --criterion, or --grid.criteria, to find tau for")
        grid = Grid((single.criterion,), (), (single.gamma,), (single.sample_from,))
        single = dataclasses.replace(single, criterion=None, gamma=0.0, sample_from="base", name="")
    if not grid.criteria:
        if grid != Grid():
            raise ValueError("grid: --grid.criteria is missing")
        return []
    set_twice = [
        key
        for key in ("name", "model", "criterion", "tau", "gamma", "sample_from", "share")
        if getattr(single, key) != getattr(Setting(), key)
    ]
    if set_twice:
        raise ValueError(f"{set_twice[0]}={getattr(single, set_twice[0])!r}: the grid says that; leave one of them out")
    if grid.taus and config.match_rate:
        raise ValueError("grid.taus and match_rate: expected only one of them")
    for key, given in (("grid.taus", grid.taus), ("match_rate", config.match_rate)):
        if given and all(criterion_of(name).constant is not None for name in grid.criteria):
            raise ValueError(f"{key}={given}: none of grid.criteria={grid.criteria} looks at a threshold")
    template = dataclasses.replace(single, model="pair")
    settings = []
    for criterion in grid.criteria:
        thresholds = _thresholds(config, grid, criterion)
        for sample_from in grid.sample_from:
            for tau, share in thresholds:
                settings += [
                    dataclasses.replace(
                        template, criterion=criterion, tau=tau, share=share, gamma=gamma, sample_from=sample_from
                    )
                    for gamma in grid.gammas
                ]
    return settings


def _thresholds(config: DecodeConfig, grid: Grid, criterion: str) -> list[tuple[float | None, float | None]]:
    """(tau, share) pairs of one criterion, one of them None."""
    how = criterion_of(criterion)
    if how.constant is not None:
        return [(None, None)]
    if config.match_rate:
        return [(None, share) for share in config.match_rate]
    taus = []
    for text in grid.taus:
        name, equals, number = str(text).rpartition("=")
        try:
            tau = float(number)
        except ValueError as error:
            raise ValueError(f"grid.taus has {text!r}: expected a number or criterion=number") from error
        if equals and name not in grid.criteria:
            raise ValueError(f"grid.taus has {text!r}: {name!r} is not in grid.criteria={grid.criteria}")
        if not equals and tau < 0 and not how.signed:
            raise ValueError(
                f"grid.taus has {text!r}: {criterion} is never negative, so it would select every token; "
                f"give criterion=number for each criterion, or --match-rate"
            )
        if not equals or name == criterion:
            taus.append(tau)
    if not taus:
        raise ValueError(f"grid: no tau for {criterion}; give --grid.taus {criterion}=NUMBER, or --match-rate SHARE")
    return [(tau, None) for tau in taus]


def _with_controls(config: DecodeConfig, settings: list[Setting]) -> list[Setting]:
    """The settings, then those of their controls that are not among them. What is there already is only marked."""
    out: dict[Setting, Setting] = {}
    for setting in settings:
        known = out.setdefault(unmarked(setting), setting)
        if known is not setting:
            raise ValueError(f"settings: {setting.name!r} is {known.name!r} again; leave one of them out")
    pair = [setting for setting in settings if setting.model == "pair" and setting.criterion != "none"]
    for role in get_args(Control):
        if role in config.controls.skip:
            continue
        for setting in pair:
            for control in _controls(config, role, setting):
                control = resolve_setting(config, dataclasses.replace(control, name="", role=cast(Role, role)))
                known = out.setdefault(unmarked(control), control)
                if setting.name not in known.control_of and known.name != setting.name:
                    out[unmarked(control)] = dataclasses.replace(known, control_of=(*known.control_of, setting.name))
    return list(out.values())


def _controls(config: DecodeConfig, role: Control, setting: Setting) -> Sequence[Setting]:
    alone = Setting(temperature=setting.temperature, top_p=setting.top_p, top_k=setting.top_k)
    if role == "gamma0":
        return [dataclasses.replace(setting, gamma=0.0)] if setting.gamma > 0 else []
    if role == "abs_delta_logp":
        if setting.criterion != "delta_logp":
            return []
        tau = None if setting.tau is None else abs(setting.tau)
        return [dataclasses.replace(setting, criterion="abs_delta_logp", tau=tau)]
    if role == "temperatures":
        others = [t for t in config.controls.temperatures if t != setting.temperature]
        return [dataclasses.replace(alone, model="rl", temperature=t) for t in others]
    return [dataclasses.replace(alone, model=role)]
