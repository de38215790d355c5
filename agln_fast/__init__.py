"""agln-fast: verified, low-latency inference engines for AGLN-family semantic segmentation networks.

    import agln_fast

    bundle = agln_fast.build("agln_r50_ade.pth", "street.agln", size=(512, 512))
    segment = agln_fast.load("street.agln")
    result = segment("street.jpg")

Importing this package is light: what a name needs is imported when the name is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from agln_fast import forking  # noqa: F401  # sees the forks from now on
from agln_fast.errors import missing_half

if TYPE_CHECKING:
    from agln_fast.builder.build import build
    from agln_fast.builder.rebuild import rebuild
    from agln_fast.builder.tune import tune
    from agln_fast.bundle import Bundle, open_bundle
    from agln_fast.data.classes import ClassSet
    from agln_fast.errors import AglnError
    from agln_fast.models.checkpoint import load_backbone, load_checkpoint, save_checkpoint
    from agln_fast.models.config import ModelConfig, list_models
    from agln_fast.models.networks import create_model
    from agln_fast.plan.fuse import fuse
    from agln_fast.plan.plan import Plan
    from agln_fast.runtime.result import Result
    from agln_fast.runtime.segmenter import Segmenter, load

__version__ = version("agln-fast")

_HOMES = {
    "AglnError": "errors",
    "Bundle": "bundle",
    "ClassSet": "data.classes",
    "ModelConfig": "models.config",
    "Plan": "plan.plan",
    "Result": "runtime.result",
    "Segmenter": "runtime.segmenter",
    "build": "builder.build",
    "create_model": "models.networks",
    "fuse": "plan.fuse",
    "list_models": "models.config",
    "load": "runtime.segmenter",
    "load_backbone": "models.checkpoint",
    "load_checkpoint": "models.checkpoint",
    "open_bundle": "bundle",
    "rebuild": "builder.rebuild",
    "save_checkpoint": "models.checkpoint",
    "tune": "builder.tune",
}

__all__ = [
    "AglnError",
    "Bundle",
    "ClassSet",
    "ModelConfig",
    "Plan",
    "Result",
    "Segmenter",
    "build",
    "create_model",
    "fuse",
    "list_models",
    "load",
    "load_backbone",
    "load_checkpoint",
    "open_bundle",
    "rebuild",
    "save_checkpoint",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing_half(error) or error from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
