"""Packing of integers of few bits."""

import pytest
import torch

from refold.nn.bits import pack_bits, unpack_bits, unpack_columns


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 32, 33, 70])
def test_rows_are_a_stream_of_bits_without_gaps(bits: int, columns: int) -> None:
    integers = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_bits(integers, bits)
    assert packed.shape == (5, -(-columns * bits // 32))
    # Python's own big integers are the reference.
    for row, words in zip(integers.tolist(), packed.tolist(), strict=True):
        stream = sum(value << (place * bits) for place, value in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words)) == stream
    assert unpack_bits(packed, bits, columns).equal(integers)
    chosen = torch.tensor([columns - 1, 0, columns // 2])
    assert unpack_columns(packed, bits, chosen).equal(integers[:, chosen])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_packs_alike(bits: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    integers = torch.randint(0, 2**bits, (6, 45), generator=torch.Generator().manual_seed(0))
    signed = (integers - 2 ** (bits - 1)).to(torch.int8)
    assert helpers.pack_to_int32(signed, bits).equal(pack_bits(integers.to(torch.uint8), bits))


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(1, 32), (3, 40), (32, 1), (1, 1)])
def test_integers_come_back_whatever_the_strides_are(bits: int, shape: tuple[int, int]):
    # A single row that was transposed has the strides of a column.
    turned = torch.randint(0, 2**bits, shape[::-1], generator=torch.Generator().manual_seed(0)).to(torch.uint8).T
    for integers in (turned, turned.clone(memory_format=torch.contiguous_format)):
        words = pack_bits(integers, bits)
        assert words.dtype == torch.int32
        assert torch.equal(unpack_bits(words, bits, shape[1]), integers)
        assert torch.equal(unpack_bits(words.T.contiguous().T, bits, shape[1]), integers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_long_number(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 9, 64, 70):
        integers = torch.randint(0, 2**bits, (3, columns), generator=generator, dtype=torch.uint8)
        words = pack_bits(integers, bits)
        for row, packed in zip(integers.tolist(), words.tolist(), strict=True):
            expected = sum(integer << (bits * place) for place, integer in enumerate(row))
            assert sum((word & (2**32 - 1)) << (32 * place) for place, word in enumerate(packed)) == expected
