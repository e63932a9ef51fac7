"""The weights of a graph: each stored once, in a file beside the graph, however many operators use it."""

import hashlib
from pathlib import Path

import torch
from onnx import TensorProto
from torch import Tensor

from refold.checkpoint.finite import require_finite
from refold.errors import FolderError
from refold.exporting.integer_blocks import to_blocks
from refold.exporting.onnx.blocks import Blocks, pack_blocks, round_blocks
from refold.exporting.onnx.graph import CONTRIB, GraphBuilder
from refold.exporting.onnx.storage import BLOCK, BlockFormat, Storage
from refold.exporting.opened import IntegerSource, TensorSource
from refold.exporting.stored_schemes import holds

DATA_NAME = "model.onnx_data"
"""Name of the file of weights; transformers.js derives this name from `model.onnx`."""
ALIGNMENT = 64
INLINE_BYTES = 1024
"""Smaller tensors stand in the graph itself."""
INT8_INPUTS = 4
"""The accuracy level at which MatMulNBits rounds its inputs to 8 bits, block by block, as llama.cpp does. With float
inputs, 8-bit matrices were 10 times slower."""
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
}


class GraphWeights:
    """Writes weights when an operator first needs them.

    Matrices of type bfloat16 are stored so and cast to the graph's type by one node, which ONNX Runtime computes when
    it loads the graph: few of its processors compute in bfloat16. Scales of rounded matrices are float16 likewise.

    Attributes:
        num_copied: Number of matrices whose integers are those that the model stores.

    Args:
        graph: The graph that gets the initializers.
        reader: Reader of the model's tensors.
        storage: The type of each tensor.
        folder: Folder of the file of weights.
    """

    def __init__(self, graph: GraphBuilder, reader: TensorSource, storage: Storage, folder: Path):
        self._graph, self._reader, self._storage = graph, reader, storage
        self._compute = torch.float16 if graph.compute == TensorProto.FLOAT16 else torch.float32
        self._file = (folder / DATA_NAME).open("xb")
        self._hash = hashlib.sha256()
        self._length = 0
        self._values: dict[tuple[str, ...], str] = {}
        self._packed: dict[str, tuple[str, str]] = {}
        self.num_copied = 0

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def vector(self, name: str, offset: float = 0.0) -> str:
        """Returns a small tensor plus a number, in the graph's type."""
        key = "vector", name, str(offset)
        if key not in self._values:
            tensor = self._reader.read(name, torch.float32) + offset
            self._values[key] = self._store(f"{name}+{offset}" if offset else name, tensor.to(self._compute))
        return self._values[key]

    def derived(self, name: str, tensor: Tensor) -> str:
        """Returns a tensor that was computed from the model's, such as a decay; equal names are stored once."""
        key = "derived", name
        if key not in self._values:
            self._values[key] = self._store(name, tensor.to(self._compute))
        return self._values[key]

    def read(self, name: str) -> Tensor:
        """Returns a tensor of the model in float32, for `derived`."""
        return self._reader.read(name, torch.float32)

    def multiply(self, x: str, name: str) -> str:
        """Multiplies `x` by the transpose of a matrix `[out, in]`."""
        format = self._storage.format_of(name)
        if format is not None:
            return self._multiply_rounded(x, name, format)
        key = "transposed", name
        if key not in self._values:
            self._values[key] = self._matrix(name, is_transposed=True)
        return self._graph.node("MatMul", x, self._values[key])

    def look_up(self, name: str, rows: str) -> str:
        """Returns rows `[B, T, columns]` of a matrix, which may also be a head."""
        graph, format = self._graph, self._storage.format_of(name)
        if format is None:
            return graph.node("Gather", self._plain(name), rows, axis=0)
        packed, scales = self._rounded(name, format)
        integers = graph.cast(graph.node("Gather", packed, rows, axis=0), graph.compute)
        if format.bits == 4:
            # The operator GatherBlockQuantized is missing in ONNX Runtime's build for browsers.
            high = graph.node("Floor", graph.mul(integers, graph.number(1 / 16)))
            low = graph.node("Sub", integers, graph.mul(high, graph.number(16.0)))
            last = graph.constant([4])
            pairs = graph.concat((graph.node("Unsqueeze", low, last), graph.node("Unsqueeze", high, last)), 4)
            integers = graph.reshape(pairs, 0, 0, 0, -1)
        centred = graph.node("Sub", integers, graph.number(float(format.zero)))
        scale = graph.node("Unsqueeze", graph.node("Gather", scales, rows, axis=0), graph.constant([3]))
        columns = self._storage.tensors[name].shape[1]
        found = graph.reshape(graph.mul(centred, scale), 0, 0, -1)
        return found if columns % BLOCK == 0 else graph.cut(found, 0, columns, 2)

    def multiply_table(self, x: str, name: str) -> str:
        """Multiplies `x [B, T, in]` by the transpose of a matrix that `look_up` reads too, stored once for both."""
        graph, format = self._graph, self._storage.format_of(name)
        if format is not None:
            return self._multiply_rounded(x, name, format)
        count, columns = self._storage.tensors[name].shape
        flat = graph.node("Gemm", graph.reshape(x, -1, columns), self._plain(name), transB=1)
        sizes = graph.node("Shape", x, start=0, end=2)
        return graph.node("Reshape", flat, graph.concat((sizes, graph.constant([count])), 0))

    def _multiply_rounded(self, x: str, name: str, format: BlockFormat) -> str:
        packed, scales = self._rounded(name, format)
        rows, columns = self._storage.tensors[name].shape
        attributes = {"K": columns, "N": rows, "bits": format.bits, "block_size": BLOCK, "accuracy_level": INT8_INPUTS}
        return self._graph.node("MatMulNBits", x, packed, scales, domain=CONTRIB, **attributes)

    def _plain(self, name: str) -> str:
        key = "plain", name
        if key not in self._values:
            self._values[key] = self._matrix(name, is_transposed=False)
        return self._values[key]

    def _matrix(self, name: str, is_transposed: bool) -> str:
        tensor = self._reader.read(name, getattr(torch, self._storage.type_of(name)))
        value = self._store(name, tensor.T.contiguous() if is_transposed else tensor)
        return value if tensor.dtype == self._compute else self._graph.cast(value, self._graph.compute)

    def _rounded(self, name: str, format: BlockFormat) -> tuple[str, str]:
        if name not in self._packed:
            blocks = self._copy_blocks(name, format)
            if blocks is None:
                blocks = round_blocks(self._reader.read(name, torch.float32), format)
            else:
                self.num_copied += 1
            packed, scales = self._store(f"{name}.packed", blocks.packed), self._store(f"{name}.scales", blocks.scales)
            if self._compute != torch.float16:
                scales = self._graph.cast(scales, self._graph.compute)
            self._packed[name] = packed, scales
        return self._packed[name]

    def _copy_blocks(self, name: str, format: BlockFormat) -> Blocks | None:
        """Returns the integers that the model stores; None: it stores floats, or integers that do not fit."""
        scheme, reader = self._storage.scheme_of(name), self._reader
        if scheme is None or not holds(format.bits, scheme) or not isinstance(reader, IntegerSource):
            return None
        found = to_blocks(reader.read_rounded(name))
        return None if found is None else pack_blocks(found.integers, found.scales, format)

    def _store(self, name: str, tensor: Tensor) -> str:
        require_finite(tensor, name, "output", FolderError, "the model's numbers were never finite")
        tensor = tensor.contiguous()
        content = tensor.flatten().view(torch.uint8).numpy()
        proto = TensorProto(name=name, data_type=ONNX_TYPES[tensor.dtype], dims=tensor.shape)
        if content.nbytes < INLINE_BYTES:
            proto.raw_data = content.tobytes()
            return self._graph.add_initializer(proto)
        self._write(bytes(-self._length % ALIGNMENT))
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": DATA_NAME, "offset": str(self._length), "length": str(content.nbytes)}
        for key, value in place.items():
            proto.external_data.add(key=key, value=value)
        self._write(content.data)
        return self._graph.add_initializer(proto)

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._length += len(content)
