"""A folder for MLServer: each bundle whole, beside the settings that name our model class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from agln_fast.serving.repositories.folder import PICTURES, Model, Named, Repository, new_model, place_bundle

__all__ = ["write"]

_IMPLEMENTATION = "agln_fast.serving.model.BundleModel"


def write(folder: Path, named: Sequence[Named], at: Path) -> Repository:
    """NAME/model-settings.json and NAME/NAME.agln for each bundle."""
    for each in named:
        model, bundle = new_model(folder, each.name), f"{each.name}.agln"
        place_bundle(each.bundle, model / bundle)
        settings = {
            "name": each.name,
            "implementation": _IMPLEMENTATION,
            "parameters": {"uri": f"./{bundle}", "version": "1"},
        }
        (model / "model-settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # The bundle's engine has a process of its own already, and MLServer's do not start with every uvloop.
    (folder / "settings.json").write_text(json.dumps({"parallel_workers": 0}, indent=2) + "\n", encoding="utf-8")
    models = tuple(Model(each.name, _IMPLEMENTATION, *PICTURES) for each in named)
    return Repository(models, ("mlserver", "start", "{repository}"))
