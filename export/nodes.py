"""Our ops as nodes of ONNX graphs: domain `agln`, one operator for each op, its reference behind it for evaluators.

An operator is made of the op's schema in `torch.library`: tensors are inputs, in the op's order, with lists of tensors
last; everything else is an attribute of the same name. `AttentionPool` is `agln::attention_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnx.reference.op_run import OpRun
from onnxscript import values
from torch import Tensor

from agln_fast.kernels import registration

__all__ = ["DOMAIN", "VERSION", "Operator", "evaluators", "operators", "translations"]

DOMAIN = "agln"
VERSION = 1
_LIST = "List[Tensor]"
_INPUTS = {
    "Tensor": OpSchema.FormalParameterOption.Single,
    "Optional[Tensor]": OpSchema.FormalParameterOption.Optional,
    _LIST: OpSchema.FormalParameterOption.Variadic,
}
_ATTRIBUTES = {
    "float": OpSchema.AttrType.FLOAT,
    "List[int]": OpSchema.AttrType.INTS,
    "bool": OpSchema.AttrType.INT,
    "Optional[int]": OpSchema.AttrType.INT,
}
_TYPES = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]


class _Parameter(NamedTuple):
    """Of an op. type: as PyTorch's schema has it."""

    name: str
    type: str


@dataclass(frozen=True)
class Operator:
    """An op of `registration.OPS` as an operator of ONNX.

    name: e.g. "AttentionPool". parameters: of the op, in its order.
    """

    op: str
    parameters: tuple[_Parameter, ...]
    outputs: int

    @property
    def name(self) -> str:
        return "".join(word.capitalize() for word in self.op.split("_"))

    def bind(self, inputs: Sequence[Any], attributes: dict[str, Any]) -> dict[str, Any]:
        """Of a node's inputs (None for one that is left out) and attributes the op's arguments, by their names."""
        flags = {parameter.name for parameter in self.parameters if parameter.type == "bool"}
        arguments = {name: bool(value) if name in flags else value for name, value in attributes.items()}
        tensors = iter(inputs)
        for parameter in self._as_inputs():
            arguments[parameter.name] = list(tensors) if parameter.type == _LIST else next(tensors, None)
        return arguments

    def split(self, arguments: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The inverse of `bind`."""
        given = dict(zip((parameter.name for parameter in self.parameters), arguments, strict=False))
        inputs: list[Any] = []
        for parameter in self._as_inputs():
            value = given.pop(parameter.name, None)
            inputs += value if parameter.type == _LIST else [value]
        return inputs, self.as_attributes(given)

    def as_attributes(self, values: dict[str, Any]) -> dict[str, Any]:
        """As ONNX has them: flags are numbers, and what is None is left out."""
        return {
            name: int(value) if isinstance(value, bool) else value
            for name, value in values.items()
            if value is not None
        }

    def input_names(self, count: int) -> list[str]:
        """Of a node with so many inputs: those of the op's arguments, that of a list as often as it has tensors."""
        names = [parameter.name for parameter in self._as_inputs()]
        return names[:count] + names[-1:] * (count - len(names))

    def _as_inputs(self) -> list[_Parameter]:
        """The tensors in the order of a node: a list of them comes last."""
        tensors = [parameter for parameter in self.parameters if parameter.type in _INPUTS]
        return sorted(tensors, key=lambda parameter: parameter.type == _LIST)

    @property
    def schema(self) -> OpSchema:
        """As ONNX describes it."""
        attributes = [
            OpSchema.Attribute(each.name, _ATTRIBUTES[each.type], required=False)
            for each in self.parameters
            if each.type in _ATTRIBUTES
        ]
        tensors = self._as_inputs()
        if tensors[-1].type == _LIST:  # onnxscript takes a list alone, or gives what stands before it twice
            tensors = [_Parameter("tensors", _LIST)]
        inputs = [OpSchema.FormalParameter(each.name, "T", param_option=_INPUTS[each.type]) for each in tensors]
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            inputs=inputs,
            outputs=[OpSchema.FormalParameter(f"y{number}", "U") for number in range(self.outputs)],
            attributes=attributes,
            type_constraints=[("T", _TYPES, ""), ("U", [*_TYPES, "tensor(uint8)", "tensor(int32)"], "")],
        )


@cache
def operators() -> dict[str, Operator]:
    """Each op's operator, by its name in ONNX."""
    found = []
    for op in registration.OPS:
        schema = getattr(torch.ops.agln, op).default._schema
        parameters = [_Parameter(each.name, str(each.type)) for each in schema.arguments]
        found.append(Operator(op, tuple(parameters), len(schema.returns)))
    return {operator.name: operator for operator in found}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`: what becomes of our ops."""
    return {getattr(torch.ops.agln, each.op).default: _translation(each) for each in operators().values()}


def _translation(operator: Operator) -> Callable[..., Any]:
    node = values.Op(values.Opset(DOMAIN, VERSION), operator.name, operator.schema)

    def translate(*arguments: Any, **keywords: Any) -> Any:
        inputs, attributes = operator.split(arguments)
        return node(*inputs, **attributes, **operator.as_attributes(keywords))

    return translate


def evaluators() -> list[type[OpRun]]:
    """For `onnx.reference.ReferenceEvaluator(new_ops=...)`: the references, in PyTorch on the CPU."""
    return [_evaluator(each) for each in operators().values()]


def _evaluator(operator: Operator) -> type[OpRun]:
    reference = registration.OPS[operator.op].reference

    def run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        given = {name: value for name, value in attributes.items() if value is not None}
        if "dtype" in given:
            given["dtype"] = getattr(torch, ir.DataType(given["dtype"]).name.lower())
        results = reference(**operator.bind([_tensor(each) for each in inputs], given))
        return tuple(map(_array, results if operator.outputs > 1 else (results,)))

    return type(operator.name, (OpRun,), {"op_domain": DOMAIN, "op_schema": operator.schema, "_run": run})


def _tensor(array: Any) -> Tensor | None:
    """NumPy's, with the bfloat16 of ml_dtypes, as PyTorch's."""
    if array is None or array.dtype != ml_dtypes.bfloat16:
        return None if array is None else torch.from_numpy(np.array(array))
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


def _array(tensor: Tensor) -> Any:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
