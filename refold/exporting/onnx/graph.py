"""An ONNX graph under construction: nodes, constants, inputs and outputs, with values named by numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from refold.version import __version__

OPSET = 23
"""The first version of ONNX that has RMSNormalization and RotaryEmbedding."""
CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
IR_VERSION = 11


class GraphBuilder:
    """Collects the parts of a graph. Values are strings: their names in the graph.

    Args:
        compute: The ONNX type of activations, `TensorProto.FLOAT` or `TensorProto.FLOAT16`.
    """

    def __init__(self, compute: int):
        self.compute = compute
        self._graph = GraphProto(name="refold")
        self._constants: dict[tuple[Any, ...], str] = {}
        self._num_values = 0

    def node(self, op: str, *inputs: str, num_outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds an operator.

        Args:
            op: Its name.
            *inputs: Values; an empty string for an optional input that is not given.
            num_outputs: Number of outputs.
            domain: The operator's domain; empty for ONNX itself.
            **attributes: The operator's attributes; None: not set.

        Returns:
            The output, or a list of all outputs where there are several.
        """
        found = [self._new_name() for _ in range(num_outputs)]
        self.named_node(op, inputs, found, domain, **attributes)
        return found[0] if num_outputs == 1 else found

    def named_node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any):
        """Adds an operator whose outputs have names of their own, such as the graph's outputs."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        node = NodeProto(op_type=op, input=given, output=outputs, domain=domain)
        for name, value in attributes.items():
            if value is not None:
                node.attribute.append(_attribute(name, value))
        self._graph.node.append(node)

    def constant(self, value: Any, dtype: type | np.dtype = np.int64) -> str:
        """Returns a small constant; equal constants are stored once."""
        array = np.asarray(value, dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            name = self._new_name()
            self._graph.initializer.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def number(self, value: float | Sequence[float]) -> str:
        """Returns a constant in the type of activations."""
        return self.constant(value, np.float16 if self.compute == TensorProto.FLOAT16 else np.float32)

    def add_initializer(self, tensor: TensorProto) -> str:
        """Adds a weight and returns its name."""
        self._graph.initializer.append(tensor)
        return tensor.name

    def add_input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Adds an input of the graph; a name in its shape is a size that callers choose."""
        self._graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def add_output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Adds an output of the graph; a node must compute it."""
        self._graph.output.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def model(self) -> ModelProto:
        """Returns the finished model."""
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(
            self._graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="refold",
            producer_version=__version__,
        )

    # The operators that many places need.

    def add(self, a: str, b: str) -> str:
        return self.node("Add", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.node("Mul", a, b)

    def cast(self, x: str, dtype: int) -> str:
        return self.node("Cast", x, to=dtype)

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=axis)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshapes; 0 keeps the size at its place, -1 is the rest."""
        return self.node("Reshape", x, self.constant(shape))

    def transpose(self, x: str, *axes: int) -> str:
        return self.node("Transpose", x, perm=axes)

    def cut(self, x: str, start: int, stop: int, axis: int) -> str:
        """Slices one axis; a negative start counts from the end, and a large stop means the end."""
        return self.node("Slice", x, *(self.constant([each]) for each in (start, stop, axis)))

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Splits the last axis."""
        if len(sizes) == 1:
            return [x]
        return self.node("Split", x, self.constant(sizes), num_outputs=len(sizes), axis=-1)

    def soft_cap(self, x: str, cap: float) -> str:
        """Returns cap tanh(x / cap)."""
        return self.mul(self.node("Tanh", self.mul(x, self.number(1.0 / cap))), self.number(cap))

    def activate(self, name: str, x: str) -> str:
        """Runs an activation of `ACTIVATION_GRAPHS`."""
        return ACTIVATION_GRAPHS[name](self, x)

    def softplus(self, x: str) -> str:
        return self.node("Softplus", x)

    def _new_name(self) -> str:
        self._num_values += 1
        return f"v{self._num_values}"


def _silu(graph: GraphBuilder, x: str) -> str:
    return graph.mul(x, graph.node("Sigmoid", x))


def _tanh_gelu(graph: GraphBuilder, x: str) -> str:
    return graph.node("Gelu", x, approximate="tanh")


def _quick_gelu(graph: GraphBuilder, x: str) -> str:
    return graph.mul(x, graph.node("Sigmoid", graph.mul(x, graph.number(1.702))))


def _squared_relu(graph: GraphBuilder, x: str) -> str:
    positive = graph.node("Relu", x)
    return graph.mul(positive, positive)


ACTIVATION_GRAPHS: Mapping[str, Callable[[GraphBuilder, str], str]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": lambda graph, x: graph.node("Gelu", x),
    "gelu_python": lambda graph, x: graph.node("Gelu", x),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), _tanh_gelu),
    "quick_gelu": _quick_gelu,
    "relu": lambda graph, x: graph.node("Relu", x),
    "relu2": _squared_relu,
    "tanh": lambda graph, x: graph.node("Tanh", x),
    "sigmoid": lambda graph, x: graph.node("Sigmoid", x),
    "linear": lambda graph, x: x,
    "none": lambda graph, x: x,
}
"""transformers' names of activations, and their graphs."""


def _attribute(name: str, value: Any) -> AttributeProto:
    # A bool is an int for ONNX, and an empty list has no type.
    return helper.make_attribute(name, int(value) if isinstance(value, bool) else value)
