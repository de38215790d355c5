"""The names in a pickle that are known to stand beside weights: results, settings, moments, random states.

Nothing here is imported or called (`weights_pickle`): a name that is known becomes a mark without value, and a file
with any other name is refused.
"""

from __future__ import annotations

__all__ = ["DICTIONARIES", "is_harmless"]

DICTIONARIES = frozenset(
    {
        "addict.addict.Dict",
        "builtins.dict",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "easydict.EasyDict",
        "fvcore.common.config.CfgNode",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "munch.Munch",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "yacs.config.CfgNode",
    }
)
"""Dictionaries of every make: weights may be in them."""

_NAMES = {
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytearray", "bytes", "complex", "float", "frozenset", "int", "list", "object", "range"}
    | {"set", "slice", "str", "tuple"}
    | {"long", "unicode", "xrange"},  # as Python 2 calls them, and so protocol 2
    "collections": {"deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "torch": {"Size", "Tensor", "Generator", "device", "per_channel_affine", "per_tensor_affine"}
    | {"per_channel_affine_float_qparams", "per_channel_symmetric", "per_tensor_symmetric"},
    "torch.nn.parameter": {"Buffer", "Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.torch_version": {"TorchVersion"},
    "types": {"SimpleNamespace"},
    "typing": {"Any"},
    "uuid": {"UUID"},
    # Python 3.13 names its paths by a module that other versions do not have.
    **{
        module: {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}
        for module in ("pathlib", "pathlib._local")
    },
    **{f"numpy.{core}.multiarray": {"_reconstruct", "scalar"} for core in ("core", "_core")},
    **{f"numpy.{core}.numeric": {"_frombuffer"} for core in ("core", "_core")},
}
# All that they define: settings, callbacks, and optimizers that were saved whole.
_PACKAGES = (
    "lightning",
    "lightning_fabric",
    "mmcv",
    "mmengine",
    "numpy.random",
    "omegaconf",
    "pytorch_lightning",
    "torch.amp",
    "torch.cuda.amp",
    "torch.optim",
)
_NUMPY_KINDS = (
    "bool",
    "bytes",
    "complex",
    "datetime",
    "float",
    "int",
    "longdouble",
    "str",
    "timedelta",
    "uint",
    "void",
)


def is_harmless(module: str, name: str) -> bool:
    """Whether `module.name` is known to stand beside weights."""
    if module == "numpy":
        return name in ("dtype", "ndarray") or name.startswith(_NUMPY_KINDS)
    if module == "numpy.dtypes":
        return name.endswith("DType")
    return name in _NAMES.get(module, ()) or any(f"{module}.".startswith(f"{package}.") for package in _PACKAGES)
