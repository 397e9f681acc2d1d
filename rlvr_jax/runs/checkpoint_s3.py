"""Lets orbax keep checkpoints at s3:// as it keeps them at gs://.

What orbax writes through, the file systems of fsspec and tensorstore, knows s3 as well. Only orbax's own choice between
a local disk and a store of objects names gs:// alone (github.com/google/orbax, issue 872), with no setting for it. So
two of its functions are wrapped: which paths have a commit file instead of a rename, and what tensorstore calls them.
"""

import os
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

_VARIABLES = {
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}


def extend_orbax_to_s3() -> None:
    """Wraps the two functions, once. Endpoint and region are those of the environment, as s3fs takes them.

    Raises:
      ValueError: this orbax is made differently.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    try:
        is_gcs_path, build = gcs_utils.is_gcs_path, tensorstore_utils.build_kvstore_tspec
    except AttributeError as error:
        raise ValueError(_refusal()) from error
    if getattr(build, "with_s3", False):
        return
    extended = _with_s3(build)
    if extended("s3://bucket/run/1", name="x")["base"].get("driver") != "s3":
        raise ValueError(_refusal())
    gcs_utils.is_gcs_path = lambda path: is_gcs_path(path) or path.as_posix().startswith("s3://")
    tensorstore_utils.build_kvstore_tspec = extended


def _with_s3(build: Callable[..., dict]) -> Callable[..., dict]:
    """`build_kvstore_tspec`, which gives tensorstore's spec of a place, for s3:// too: that of gs:// translated."""

    def build_kvstore_tspec(directory: str, name: str | None = None, **options: Any) -> dict:
        if not str(directory).startswith("s3://"):
            return build(directory, name, **options)
        return _translated(build("gs://" + str(directory).removeprefix("s3://"), name, **options))

    build_kvstore_tspec.with_s3 = True  # type: ignore[attr-defined]
    return build_kvstore_tspec


def _translated(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return s3_kvstore(spec["bucket"], spec["path"])
    return {key: _translated(value) for key, value in spec.items()}


def s3_kvstore(bucket: str, path: str) -> dict[str, Any]:
    """Tensorstore's spec of a place in a bucket."""
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    for key, names in _VARIABLES.items():
        if value := next((os.environ[name] for name in names if os.environ.get(name)), None):
            spec[key] = value
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it looks everywhere, and complains of every place
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def _refusal() -> str:
    return f"checkpoints at s3:// with orbax-checkpoint {ocp.__version__}: not possible, expected 0.12.8, or a place at gs://"
