"""A folder for Ray Serve: each bundle whole, and the file for `serve run` and `serve deploy` that names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agln_fast.errors import MissingPackageError
from agln_fast.serving.repositories.folder import PICTURES, Model, Named, Repository, new_model, place_bundle

__all__ = ["write"]

_APP = "agln_fast.serving.ray:app"
_HEAD = """\
# After a change: serve deploy serve.yaml. Below user_config, the replicas that run open their engines anew. Anywhere
# else, others take their place.
"""


def write(folder: Path, named: Sequence[Named], at: Path) -> Repository:
    """NAME/NAME.agln for each bundle, and `serve.yaml` with all arguments of the application.

    Raises:
        MissingPackageError: Ray is not installed.
    """
    try:
        import yaml
        from ray.serve.schema import ServeDeploySchema
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "ray", "ray") from None
    from agln_fast.serving.ray import Arguments
    from agln_fast.serving.ray.bundles import OPTIONS, Bundles

    bundles = {}
    for each in named:
        bundle = new_model(folder, each.name) / f"{each.name}.agln"
        place_bundle(each.bundle, bundle)
        bundles[each.name] = str(at / bundle.relative_to(folder))
    arguments = Arguments(bundles=bundles)
    application = {
        "name": "agln-fast",
        "route_prefix": "/",
        "import_path": _APP,
        "args": arguments.model_dump(exclude={"bundle", *OPTIONS}),
        # Ray replaces the replicas of a deployment that is listed for the first time.
        "deployments": [{"name": Bundles.__name__, "user_config": arguments.user_config()}],
    }
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [application],
    }
    ServeDeploySchema.model_validate(config)
    (folder / "serve.yaml").write_text(_HEAD + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    models = tuple(Model(each.name, _APP, *PICTURES) for each in named)
    note = f"every node of the cluster must find the bundles in {at}, or where you say in serve.yaml"
    return Repository(models, ("serve", "run", "{repository}/serve.yaml"), notes=(note,))
