"""A GGUF file as data: its keys, and each tensor with the weights that it is computed from; torch-free."""

import math
from dataclasses import dataclass, field

from refold.mixers.spec import Shape

FieldValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
"""Value of a key. A whole number is written as uint32, in lists as int32; a fraction as float32."""


@dataclass(frozen=True)
class WeightPiece:
    """A canonical weight at a depth, and the changes that llama.cpp's layout needs, in the order of the fields.

    Attributes:
        canonical: Canonical name, such as `mixer.q_proj.weight`.
        depth: The depth; None outside the stack.
        span: `(start, stop)`: rows that are taken; None: all.
        repeat: `(heads, times)`: each of so many heads of rows is repeated so often; None: no repetition.
        negative_exp: Whether the value is replaced by its negative exponential (`A = -exp(A_log)` of Mamba-2).
        offset: Number added to each value (Gemma's norms store `weight - 1`).
        factor: Number that each value is multiplied by.
        rotary_heads: Number of heads whose rows are brought from the order of halves (transformers) into the order of
            pairs (llama.cpp's rotary type `norm`); 0: the order stays.
        rows: Number of rows after padding with zeros; 0: no padding.
        columns: Number of columns after padding with zeros; 0: no padding.
    """

    canonical: str
    depth: int | None = None
    span: tuple[int, int] | None = None
    repeat: tuple[int, int] | None = None
    negative_exp: bool = False
    offset: float = 0.0
    factor: float = 1.0
    rotary_heads: int = 0
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: Name, such as `blk.3.attn_q.weight`.
        shape: Shape, rows first (a GGUF file lists the sizes in the opposite order).
        pieces: The weights that are concatenated by rows.
        values: The numbers of a tensor that is no weight, such as rotary factors.
        fill: The number that fills a tensor without pieces and values.
        is_float32: Whether llama.cpp requires float32: norms, biases, and tensors of state-space layers.
    """

    name: str
    shape: Shape
    pieces: tuple[WeightPiece, ...] = ()
    values: tuple[float, ...] | None = None
    fill: float = 0.0
    is_float32: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufContents:
    """The contents of a file, without the vocabulary.

    Attributes:
        architecture: llama.cpp's name of the architecture, the first part of its keys.
        fields: Value by key; `{arch}` in a key stands for the architecture.
        tensors: The tensors in the order of the file.
        notes: Sentences about differences between the file and the model.
        has_own_widths: Whether layers have sizes of their own; otherwise narrower ones are padded to the widest.
    """

    architecture: str
    fields: dict[str, FieldValue]
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...] = field(default=())
    has_own_widths: bool = False

    @property
    def num_elements(self) -> int:
        """Number of numbers in all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors)
