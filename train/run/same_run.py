"""Whether a start is the run that its folder holds: the same configuration, and inputs of the same content.

Where an input lies does not matter, and how its path is spelled: a model or a file may move between two starts.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr_jax.data.text import Tokenizer
from rlvr_jax.runs.checkpoint import require_same_config
from rlvr_jax.runs.files import parse_json, write_json
from rlvr_jax.runs.fingerprint import CODE, of_file, of_model, of_tokenizer
from rlvr_jax.runs.folder import own_config
from rlvr_jax.runs.program import config_dict

log = logging.getLogger(__name__)

CONTENT = ("inputs", "data_sha256")  # of a record: what is read, as fingerprints
RESULTS = ("metrics.jsonl", "rollouts", "eval", "generated", "microscope", "hf")  # of a run, in its folder
_GO_ON = "use another run folder, or put the former content back"


def model_inputs(
    name: str,
    model: Path | None,
    tokenizer: Tokenizer,
    tokenizer_folder: Path | None,
    *,
    init_config: Path | None = None,
) -> dict[str, str]:
    """Fingerprints of the model that a run begins with, by what to call them in a sentence.

    Args:
      name: key of the model's path in the configuration.
      model: its folder; None: random weights, for the config.json (or its folder) that `init_config` is.
      tokenizer, tokenizer_folder: of the run (`rlvr_jax.runs.fingerprint.of_tokenizer`).
    """
    found = of_tokenizer(tokenizer.chat_template, tokenizer_folder)
    if model is not None:
        found |= of_model(model, name)
    if init_config is not None:
        path = init_config / "config.json" if init_config.is_dir() else init_config
        found["architecture of init_config"] = of_file(path)
    return found


def record_of(config: Any, inputs: Mapping[str, str], data: Sequence[bytes]) -> dict[str, Any]:
    """What a start is compared with at the next one.

    Args:
      config: the resolved configuration, a dataclass.
      inputs: fingerprints of what is read, by what to call it in a sentence.
      data: the training data as the model reads them.
    """
    record = {name: value for name, value in config_dict(config).items() if name != "distributed"}
    return record | {"inputs": dict(inputs), "data_sha256": fingerprint(*data)}


def fingerprint(*parts: bytes) -> str:
    """SHA-256 of the data that a run trains on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def require_same_run(
    saved: Mapping[str, Any], record: Mapping[str, Any], may_change: Sequence[str], *, defaults: Mapping[str, Any]
) -> None:
    """Refuses a start that is another run than a saved one.

    Args:
      saved, record: records, as `record_of` makes them, of the run and of this start.
      may_change: dotted keys that do not change what is trained.
      defaults: the value that an option younger than the saved record had in it.

    Raises:
      ValueError: naming what differs, a key or an input.
    """
    saved = _filled(saved, defaults)
    require_same_config(saved, record, may_change=(*may_change, *CONTENT, "distributed"))
    before, now = saved.get("inputs", {}), record.get("inputs", {})
    if now and not before:
        log.warning("an older version began this run: whether its model is still the same cannot be checked")
    for name in before:
        if before[name] != now.get(name):
            if not name.startswith(CODE):
                raise ValueError(f"{name}: the content is not what the run began with; {_GO_ON}")
            if not record.get("checkpoint", {}).get("changed_code"):
                raise ValueError(f"{name}: not what the run began with; --checkpoint.changed-code resumes with it")
            log.warning("%s: it is not what the run began with", name)
    if saved.get("data_sha256") != record.get("data_sha256"):
        raise ValueError(
            "the training data as the model reads them (problems or conversations, answers, chat template, tokenizer) "
            f"are not what the run began with; {_GO_ON}"
        )


def require_free(
    folder: Path, record: Mapping[str, Any], may_change: Sequence[str], *, defaults: Mapping[str, Any]
) -> None:
    """For a folder without a checkpoint: refuses to begin where that would replace what another run has left.

    Raises:
      ValueError: another run's results, or a config.json that no run of this program wrote.
    """
    saved = own_config(folder, record.keys() | {"distributed"})
    found = [name for name in RESULTS if _has_content(folder / name)]
    if not found:
        return
    if saved is None:
        raise ValueError(
            f"{folder}: holds {', '.join(found)}, and no config.json says of which run; use another run folder"
        )
    content = folder / "inputs.json"
    try:
        known = parse_json(content.read_bytes(), content) if content.is_file() else dict(record)
        saved |= {name: known[name] for name in CONTENT if name in known}
        require_same_run(saved, record, may_change, defaults=defaults)
    except ValueError as error:
        raise ValueError(f"{folder} holds the results of another run ({', '.join(found)}): {error}") from error
    log.warning("%s holds no whole checkpoint: the run in it begins again at its first step", folder)


def write_record(folder: Path, config: Any, record: Mapping[str, Any]) -> None:
    """Writes config.json and inputs.json, which say whose folder this is."""
    write_json(folder / "config.json", config_dict(config))
    write_json(folder / "inputs.json", {name: record[name] for name in CONTENT})


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def _filled(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return dict(defaults) | {
        key: _filled(value, defaults.get(key) or {}) if isinstance(value, Mapping) else value
        for key, value in saved.items()
    }
