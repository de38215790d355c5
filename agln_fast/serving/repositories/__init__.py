"""Folders from which servers of others serve bundles: a file here for each server.

A writer gets an empty folder, the bundles, and the path at which the folder will stand, and says what it wrote. One
more is one line in `SERVERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import agln_fast
from agln_fast.errors import ConfigError, choose, printable
from agln_fast.files import whole_folder
from agln_fast.serving.repositories import mlserver, openvino_model_server, ray, triton
from agln_fast.serving.repositories.folder import Model, Named, Repository, open_named

__all__ = ["SERVERS", "Model", "Named", "Repository", "Writer", "export_repository", "is_repository"]

Writer: TypeAlias = Callable[[Path, Sequence[Named], Path], Repository]

SERVERS: Final[dict[str, Writer]] = {
    "triton": triton.write,
    "openvino-model-server": openvino_model_server.write,
    "mlserver": mlserver.write,
    "ray": ray.write,
}
"""What writes a repository, by the name of the server."""

_RECORD = "repository.json"


def export_repository(
    bundles: Iterable[tuple[str, Path]], server: str, output: Path, *, overwrite: bool = False
) -> Repository:
    """Write a folder from which a server serves bundles; it appears whole or not at all.

    Args:
        bundles: names and paths. Several under one name are one network that was built on several GPUs.
        server: one of `SERVERS`.
        output: the folder.
        overwrite: replace it, if this function wrote it.

    Returns:
        What was written, with the folder's name in `start`.

    Raises:
        ConfigError: an unknown server, bundles or models that cannot share a name, or a folder that is there.
        BundleError: a bundle that cannot be opened, or holds nothing for this server.
        MissingPackageError: what writes for this server is not installed.
        BuildError: the folder cannot be written.
    """
    write = SERVERS[choose("server", server, SERVERS)]
    _check(output, overwrite)
    named = open_named(bundles)
    with whole_folder(output, is_repository if overwrite else None) as folder:
        written = write(folder, named, output.absolute())
        record = {"server": server, "agln_fast": agln_fast.__version__, **_record(written)}
        (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return replace(written, start=tuple(word.replace("{repository}", str(output)) for word in written.start))


def is_repository(folder: Path) -> bool:
    """Whether `export_repository` wrote it."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"server", "agln_fast", "models"} <= record.keys()


def _record(written: Repository) -> dict[str, Any]:
    return {"models": [asdict(model) for model in written.models], "left_out": dict(written.left_out)}


def _check(output: Path, overwrite: bool) -> None:
    try:
        exists = output.exists()
    except OSError as error:
        raise ConfigError(f"{printable(output)}: cannot be written ({error.strerror}); choose another name") from None
    if exists and not overwrite:
        raise ConfigError(f"{output}: exists already; choose another name, or replace it with --force (overwrite=True)")
    if exists and not is_repository(output):
        raise ConfigError(
            f"{output}: exists and is no repository that agln-fast wrote, so it is not replaced; choose another name"
        )
