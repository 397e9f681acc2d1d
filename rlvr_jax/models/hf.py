"""Hugging Face checkpoint folders in and out: config.json, safetensors, generation_config.json, tokenizer files."""

import json
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf_folder import INDEX, SINGLE, check_tensors, find_tensors, refuse_adapter
from rlvr_jax.models.hf_names import Slot, checkpoint_slots
from rlvr_jax.models.qwen import Params, param_specs
from rlvr_jax.models.tensorfile import DTYPES, TensorInfo, read_tensor, tensor_bytes, write_file
from rlvr_jax.runs.paths import at_home
from rlvr_jax.runs.remote import is_url, local_copy
from rlvr_jax.sharding.rules import ShardingRules

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # what `save_hf` calls its files
_BLOCK = 256  # rows transposed at a time, so that both sides stay in the processor's cache


def load_hf(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[QwenConfig, Params]:
    """Reads a dense Qwen2, Qwen2.5 or Qwen3 checkpoint in the Hugging Face layout.

    Reads config.json and model.safetensors, or the shards that model.safetensors.index.json lists. Pickled weights are
    never read and no code from the folder is ever run. Tensors are read one at a time and converted on the way, so host
    memory peaks near one copy of the weights in `dtype` (on an accelerator: near one stacked parameter; with a mesh
    over several hosts: each host keeps only its own part). The tokenizer is not touched.

    Args:
      path: a local folder, or, when there is none of that name, the name of a repository on the Hugging Face hub
        ("Qwen/Qwen2.5-Math-7B"), which is downloaded to the hub's cache (json and safetensors files only), or a URL
        (gs://, s3://), which is copied to `remote.cache_folder()`.
      dtype: dtype of the parameters; None keeps the stored one.
      mesh: places each parameter on this mesh, laid out by `rules`; without one, on the default device.
      rules: logical axis -> mesh axis; `ShardingRules()` by default.
      overrides: fields for `QwenConfig.from_hf`, e.g. {"max_position_embeddings": 32768}. A smaller vocab_size reads
        only the first rows of the embedding and of the unembedding: the others are padding beyond the tokenizer.

    Returns:
      The config and the parameters, for `Qwen(config).apply({"params": params}, tokens_BT)`.

    Raises:
      FileNotFoundError: neither a folder nor a repository that can be reached, or a file is missing in it.
      ValueError: an unsupported config, or tensors that are missing, unknown, duplicate, wrongly shaped or of a dtype
        that is not a float; every one is named.
    """
    folder = checkpoint_folder(path)
    config = QwenConfig.from_hf(folder, **(overrides or {}))
    slots = checkpoint_slots(config)
    infos = find_tensors(folder, tied=config.tie_word_embeddings)
    check_tensors(folder, config, slots, infos, cut="vocab_size" in (overrides or {}))
    if dtype is None:
        stored = {infos[name].dtype for name in slots}
        if len(stored) > 1:
            raise ValueError(f"{folder}: stored in several dtypes {sorted(stored)}, so dtype=None is not defined")
        dtype = DTYPES[stored.pop()]

    by_leaf: dict[tuple[str, ...], list[str]] = {}
    for name, slot in slots.items():
        by_leaf.setdefault(slot.path, []).append(name)
    rules = ShardingRules() if rules is None else rules
    params: dict[str, Any] = {"layers": {}}
    for leaf_path, names in by_leaf.items():
        spec: Any = param_specs(config)
        for key in leaf_path:
            spec = spec[key]
        sharding = None if mesh is None else rules.sharding(mesh, spec.axes, spec.shape)
        leaf = _assemble(spec.shape, np.dtype(dtype), sharding, [(slots[name], infos[name]) for name in names])
        (params["layers"] if len(leaf_path) == 2 else params)[leaf_path[-1]] = leaf
    return config, params


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """The local folder of `path`; copies what is at a URL, downloads a hub repository where there is no such folder."""
    if is_url(path):
        return local_copy(os.fspath(path))
    folder, name = Path(at_home(path)), str(path)
    if folder.is_dir():
        refuse_adapter(folder)
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{path}: is a file, expected a checkpoint folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise FileNotFoundError(f"{path}: no such folder (nor is this a hub name such as 'Qwen/Qwen2.5-Math-7B')")
    import huggingface_hub  # only here: a local load must not depend on the hub's settings

    try:
        # The config first: an unsupported model is refused before gigabytes are fetched.
        QwenConfig.from_hf(huggingface_hub.hf_hub_download(name, "config.json"))
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except OSError as error:  # the hub's errors, offline mode and connection failures are all of this kind
        reason = f"{type(error).__name__}: {error}"
        raise FileNotFoundError(f"{path}: no such folder, and not obtained from the hub ({reason})") from error


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a page boundary, which the CPU backend takes over without a copy."""
    size = tensor_bytes(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).view(dtype).reshape(shape)


def _assemble(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None, parts: Iterable[tuple[Slot, TensorInfo]]
) -> jax.Array:
    """One parameter from its tensors (one, or one a layer): only the regions that this process's devices hold."""
    if sharding is None:
        regions: Mapping[Any, Any] = {None: (slice(None),) * len(shape)}  # None: wherever jax places arrays by default
    else:
        regions = sharding.addressable_devices_indices_map(shape)
    bounds = {d: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for d, index in regions.items()}
    buffers = {region: _empty(tuple(stop - start for start, stop in region), dtype) for region in set(bounds.values())}
    for slot, info in parts:
        tensor = read_tensor(info, rows=slot.shape[0])
        for region, buffer in buffers.items():
            if slot.layer is None:
                _fill(buffer, tensor, slot.transposed, shape, region)
            elif region[0][0] <= slot.layer < region[0][1]:
                _fill(buffer[slot.layer - region[0][0]], tensor, slot.transposed, shape[1:], region[1:])
    arrays = [jax.device_put(buffers[bounds[device]], device) for device in regions]
    if sharding is None:
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _fill(
    out: np.ndarray, tensor: np.ndarray, transposed: bool, shape: tuple[int, ...], region: tuple[tuple[int, int], ...]
) -> None:
    """Copies the `region` of a parameter of `shape` out of its folder form `tensor` into `out`, in `out`'s dtype."""
    source = (tensor.T if transposed else tensor).reshape(shape)[tuple(slice(*bounds) for bounds in region)]
    # Bits move faster than bfloat16 values, and a transposed copy faster in blocks.
    bits = np.dtype(f"u{out.itemsize}")
    for start in range(0, len(source), _BLOCK):
        out[start : start + _BLOCK].view(bits)[...] = source[start : start + _BLOCK].astype(out.dtype).view(bits)


def save_hf(
    path: str | os.PathLike[str],
    config: QwenConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: float | int = 5e9,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face checkpoint folder, which transformers (and `load_hf`) load.

    The folder gets config.json, generation_config.json, model.safetensors (or numbered shards and their index) and the
    tokenizer's files. Everything is written to a folder beside it first and moved into place at the end, config.json
    last, so an interrupted save leaves no folder that looks like a checkpoint. Loading it back in the stored dtype is
    bit-identical. Tensors are brought to the host one at a time. With several processes all must call it; the first one
    writes, to a disk of its own or a shared one.

    Args:
      path: the folder; made if it does not exist.
      config: the architecture of `params`.
      params: the parameters, stacked over layers as `load_hf` and `init_params` give them; sharded or not.
      tokenizer: anything with `save_pretrained(folder)`; its token ids also go into the two configs.
      dtype: dtype to store; None keeps that of the embedding for all.
      max_shard_bytes: beyond this many bytes the weights are split into files of at most so many (a tensor that is
        larger than this gets a file of its own).
      generation_config: content of generation_config.json; by default the special token ids of the tokenizer. The
        token ids in it go into config.json too.
      overwrite: replace a checkpoint that is already there.

    Raises:
      FileExistsError: the folder already holds a checkpoint, and `overwrite` is false.
      ValueError: parameters that do not fit the config, each named, or a dtype that safetensors or the model lacks.
    """
    folder = Path(at_home(path))
    writer = jax.process_index() == 0
    slots = checkpoint_slots(config)
    _check_params(config, params)
    stored = np.dtype(params["embed"].dtype if dtype is None else dtype)
    if stored not in DTYPES.values():
        raise ValueError(f"save_hf: dtype is {stored}, expected one of {', '.join(map(str, DTYPES.values()))}")
    refusal = _refusal(folder, overwrite) if writer else ""
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(bool(refusal))):
        refusal = refusal or f"{folder}: refused by the first process"  # or the others would wait for it
    if refusal:
        raise FileExistsError(refusal)

    temporary = folder.resolve().with_name(f".{folder.resolve().name}.{os.getpid()}.tmp")
    try:
        if writer:
            temporary.mkdir(parents=True)
        _write_weights(temporary, slots, params, stored, max_shard_bytes, writer)
        if writer:
            _write_configs(temporary, config, stored, tokenizer, generation_config)
            _move_into_place(temporary, folder)
    finally:
        if writer:
            shutil.rmtree(temporary, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")  # nobody reads before it is whole


def _refusal(folder: Path, overwrite: bool) -> str:
    """Why the folder may not be written to; empty when it may."""
    if folder.exists() and not folder.is_dir():
        return f"{folder}: is a file, expected a folder to write to"
    if folder.is_dir() and not overwrite and (present := _checkpoint_files(folder)):
        return f"{folder}: already holds a checkpoint ({', '.join(present)}); pass overwrite=True to replace it"
    return ""


def _check_params(config: QwenConfig, params: Params) -> None:
    expected = {jax.tree_util.keystr(k): s.shape for k, s in _leaves(param_specs(config))}
    given = {jax.tree_util.keystr(k): np.shape(x) for k, x in jax.tree_util.tree_leaves_with_path(dict(params))}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in given]
    problems += [f"unknown: {name} {shape}" for name, shape in given.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {given[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise ValueError("save_hf: the parameters do not fit the config\n  " + "\n  ".join(problems))


def _leaves(specs: Params) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: hasattr(leaf, "axes"))


def _checkpoint_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name in ("config.json", INDEX) or p.suffix == ".safetensors")


def _write_weights(
    folder: Path, slots: Mapping[str, Slot], params: Params, dtype: np.dtype, max_shard_bytes: float | int, writer: bool
) -> None:
    shards: list[list[str]] = [[]]
    used = 0
    for name, slot in slots.items():
        size = tensor_bytes(slot.shape, dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [SINGLE]

    def producer(slot: Slot) -> Any:
        return lambda: _to_host(slot, params, dtype)

    for file, names in zip(files, shards, strict=True):
        tensors = {name: (slots[name].shape, producer(slots[name])) for name in names}
        if writer:
            write_file(folder / file, tensors, dtype, {"format": "pt"})
        else:  # the other processes take part in gathering
            for _, produce in tensors.values():
                produce()
    if writer and len(files) > 1:
        total = sum(tensor_bytes(slot.shape, dtype) for slot in slots.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _to_host(slot: Slot, params: Params, dtype: np.dtype) -> np.ndarray:
    """One tensor in its folder form."""
    leaf: Any = params
    for key in slot.path:
        leaf = leaf[key]
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and {d.platform for d in leaf.devices()} == {"cpu"}:
        leaf = np.asarray(leaf)  # a view where it lies on one device
    part = leaf if slot.layer is None else leaf[slot.layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    array = np.asarray(part).astype(dtype, copy=False)
    if not slot.transposed:
        return array.reshape(slot.shape)
    bits = array.reshape(slot.shape[1], slot.shape[0]).view(np.dtype(f"u{dtype.itemsize}"))
    out = np.empty(slot.shape, bits.dtype)
    for start in range(0, slot.shape[1], _BLOCK):
        out[:, start : start + _BLOCK] = bits[start : start + _BLOCK].T
    return out.view(dtype)


def _write_configs(
    folder: Path, config: QwenConfig, dtype: np.dtype, tokenizer: Any, generation_config: Mapping[str, Any] | None
) -> None:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: value for key in keys if (value := getattr(tokenizer, key, None)) is not None}
    settings = ids if generation_config is None else dict(generation_config)
    ids |= {key: settings[key] for key in keys if settings.get(key) is not None}
    _dump(folder / "generation_config.json", settings)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    _dump(folder / "config.json", config.to_hf() | ids | {"torch_dtype": dtype.name})


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move_into_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(temporary, folder)
        return
    # A folder with other content keeps it, such as the weights of an adapter. The old config goes first and the new one
    # comes last, so that there is never a mixture that could be loaded.
    (folder / "config.json").unlink(missing_ok=True)
    for name in _checkpoint_files(folder):
        if name == INDEX or _WEIGHTS.fullmatch(name):
            (folder / name).unlink()
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
