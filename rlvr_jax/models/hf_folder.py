"""Which tensors a Hugging Face folder holds, and whether they are those of its config."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf_names import TOP_NAMES, Slot
from rlvr_jax.models.tensorfile import DTYPES, TensorInfo, read_header, same_values
from rlvr_jax.runs.files import read_json

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_ADAPTER_ALONE = (
    f"holds an adapter ({ADAPTER}) and no full weights; merge it into its base model first, "
    "for example with merge_and_unload of peft"
)
_MOST_INDEX = 1 << 26  # bytes
_NAMED = 20  # problems in a message
# Buffers that older conversions store: they follow from the config, and every loader passes over them.
_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def count_weights(where: str, names: Iterable[str]) -> int:
    """How many of a folder's files hold full weights.

    Raises:
      ValueError: none does; of an adapter alone it says so.
    """
    names = list(names)
    count = sum(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names)
    if not count and ADAPTER in names:
        raise ValueError(f"{where}: {_ADAPTER_ALONE}")
    if not count:
        raise ValueError(f"{where}: no .safetensors file in this folder")
    return count


def refuse_adapter(folder: Path) -> None:
    """Raises ValueError for a folder that holds an adapter alone, and so no config.json."""
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: {_ADAPTER_ALONE}")


def find_tensors(folder: Path, *, tied: bool) -> dict[str, TensorInfo]:
    """The tensors of a folder's one file or of the shards in its index, by the names in `hf_names`.

    Buffers are left out. A `tied` model may store its shared matrix as lm_head.weight alone.

    Raises:
      ValueError, FileNotFoundError: naming the file: duplicate tensors, a false index, missing weights.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder}: holds both {SINGLE} and {INDEX}, so every tensor is duplicate; keep one")
    if single.is_file():
        infos = read_header(single)
    elif index.is_file():
        infos = _read_shards(folder, index)
    else:
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
        hint = f"; pickled weights are never read: {', '.join(pickled)}" if pickled else ""
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}{hint}")
    if (folder / ADAPTER).is_file():
        logger.warning(
            "%s: holds full weights and an adapter (%s): the full weights are read, the adapter is not applied",
            *(folder, ADAPTER),
        )
    infos = {name: info for name, info in infos.items() if not _BUFFER.fullmatch(name)}
    if tied and TOP_NAMES["embed"] not in infos and TOP_NAMES["unembed"] in infos:
        infos[TOP_NAMES["embed"]] = infos.pop(TOP_NAMES["unembed"])
    return infos


def _read_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index, most_bytes=_MOST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index}: expected a JSON object with a weight_map from tensor to file")
    infos: dict[str, TensorInfo] = {}
    problems = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
            raise ValueError(f"{index}: weight_map names the file {shard!r:.200}, expected a .safetensors file")
        if not (folder / shard).is_file():
            absent = sorted(name for name, file in weight_map.items() if file == shard)
            raise FileNotFoundError(f"{folder / shard}: no such shard; missing tensors: {_listed(absent, ', ')}")
        for name, info in read_header(folder / shard).items():
            if name in infos:
                problems.append(f"duplicate: {name} (in {infos[name].file.name} and {shard})")
            elif weight_map.get(name, shard) != shard:
                problems.append(f"duplicate: {name} (in {shard}, but the index says {weight_map[name]})")
            infos[name] = info
    problems += [f"missing: {name} (the index says {weight_map[name]})" for name in weight_map if name not in infos]
    _raise(folder, problems)
    return infos


def check_tensors(
    folder: Path, config: QwenConfig, slots: Mapping[str, Slot], infos: Mapping[str, TensorInfo], *, cut: bool
) -> None:
    """Raises ValueError naming the tensors that are missing, unknown, of a wrong shape or of an unreadable dtype.

    With `cut` the embedding and the unembedding may have more rows than the config's vocabulary.
    """
    problems = [f"missing: {name} {list(slot.shape)}" for name, slot in slots.items() if name not in infos]
    for name, info in infos.items():
        if name == TOP_NAMES["unembed"] and config.tie_word_embeddings:
            # Some published tied checkpoints store the shared matrix twice; only a true copy can be passed over, for
            # transformers does not tie two that differ.
            if TOP_NAMES["embed"] in infos and not same_values(info, infos[TOP_NAMES["embed"]]):
                problems.append(f"unknown: {name} differs from {TOP_NAMES['embed']}, but tie_word_embeddings is true")
        elif name not in slots:
            problems.append(f"unknown: {name} {list(info.shape)}")
        elif not _fits(info.shape, slots[name].shape, cut and name in TOP_NAMES.values()):
            problems.append(f"wrong shape: {name} is {list(info.shape)}, expected {list(slots[name].shape)}")
        elif info.dtype not in DTYPES:
            problems.append(f"wrong dtype: {name} is {info.dtype}, expected one of {', '.join(DTYPES)}")
    _raise(folder, problems)


def _fits(stored: tuple[int, ...], expected: tuple[int, ...], longer: bool) -> bool:
    """Whether a tensor has the expected shape; `longer`: or has more rows (a vector has no rows to spare)."""
    if longer and len(stored) == len(expected) == 2:
        return stored[0] >= expected[0] and stored[1] == expected[1]
    return stored == expected


def _raise(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder}: {len(problems)} problems with its tensors\n  " + _listed(problems, "\n  "))


def _listed(names: list[str], between: str) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return between.join([*names[:_NAMED], *more])
