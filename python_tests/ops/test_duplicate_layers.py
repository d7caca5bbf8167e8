"""duplicate_layers_: any map with map[i] <= i, on bytes of any type, against a copy of the old bank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackbert_kernels import ops
from stackbert_kernels.ops._library import _C, WHY_NO_NATIVE_CUDA
from stackbert_kernels.ops.duplicate_layers.op import _duplicate_banks_, _duplicate_layers_

IMPLS = ("reference", "native", "triton")
WIDE = 3_000_001  # float32: past the size from which the CPU kernel streams, and not a whole number of cache lines


def oracle(bank: torch.Tensor, layer_map: list[int]) -> torch.Tensor:
    old, new = bank.clone(), bank.clone()
    for i, source in enumerate(layer_map):
        new[i] = old[source]
    return new


@st.composite
def maps(draw, layers=12):
    n = draw(st.integers(0, layers))
    return [draw(st.integers(0, i)) for i in range(n)]


@pytest.mark.parametrize("impl", IMPLS)
@given(layer_map=maps(), columns=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_any_map_from_below(impl, layer_map, columns):
    bank = torch.randn(12, columns)
    wanted = oracle(bank, layer_map)
    assert ops.duplicate_layers_(bank, layer_map, impl=impl) is bank
    assert torch.equal(bank, wanted)


@pytest.mark.parametrize("layer_map", [[0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0], [0, 1, 2, 2, 2, 2, 2]])
def test_large_rows_in_many_slices(layer_map):
    """Streamed stores, rows that begin anywhere in a cache line, more threads than cores."""
    bank = torch.randn(7, WIDE)
    wanted = oracle(bank, layer_map)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.duplicate_layers_(bank.clone(), layer_map, impl="native"), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_any_dtype_and_bits(impl, dtype):
    """Bytes are copied, not values: NaN payloads and negative zeros survive."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6, 33 * width), dtype=torch.uint8)
    wanted = oracle(raw, [0, 1, 2, 0, 1, 2])
    ops.duplicate_layers_(raw.view(dtype), [0, 1, 2, 0, 1, 2], impl=impl)
    assert torch.equal(raw, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_apart(impl):
    """A column slice of a wider bank (the decayed part): the other columns, before, between and after, keep every bit."""
    wide = torch.randn(8, 101)
    wanted = wide.clone()
    wanted[:, 7:90] = oracle(wide[:, 7:90], [0, 0, 1, 1])
    ops.duplicate_layers_(wide[:, 7:90], [0, 0, 1, 1], impl=impl)
    assert torch.equal(wide, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_higher_rank_and_empty_banks(impl):
    bank = torch.randn(6, 4, 5)
    wanted = oracle(bank, [0, 0, 1])
    assert torch.equal(ops.duplicate_layers_(bank, [0, 0, 1], impl=impl), wanted)
    for shape in [(0,), (0, 4), (4, 0)]:
        assert ops.duplicate_layers_(torch.empty(shape), [0] * min(shape[0], 2), impl=impl).shape == shape
    assert torch.equal(ops.duplicate_layers_(torch.arange(4), [0, 0], impl=impl), torch.tensor([0, 0, 2, 3]))


@pytest.mark.parametrize("impl", IMPLS)
def test_more_rows_than_one_launch_moves(impl):
    bank = torch.randn(150, 3)  # the CUDA kernels move 128 rows a launch, the Triton kernel 32
    layer_map = [i // 2 for i in range(150)]
    wanted = oracle(bank, layer_map)
    assert torch.equal(ops.duplicate_layers_(bank, layer_map, impl=impl), wanted)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    ("columns", "stride"), [(4096 * 16 + 32, 4096 * 16 + 32), (65, 80), (48, 52), (20, 22), (8, 24)]
)
def test_triton_units_of_every_size(columns, stride, offset):
    """Rows that begin and end on 16, 8, 4, 2 or 1 bytes; the first are wider than what a program moves."""
    around = torch.randint(0, 256, (offset + 6 * stride + 16,), dtype=torch.uint8)
    wanted = around.clone()
    bank, wanted_bank = (t[offset:].as_strided((6, columns), (stride, 1)) for t in (around, wanted))
    wanted_bank.copy_(oracle(bank, [0, 1, 1, 0, 2, 2]))
    ops.duplicate_layers_(bank, [0, 1, 1, 0, 2, 2], impl="triton")
    assert torch.equal(around, wanted)


def test_triton_names_a_row_by_12_bits():
    bank = torch.arange(4096.0)[:, None]
    wanted = oracle(bank, [*range(4095), 4094])
    assert torch.equal(ops.duplicate_layers_(bank, [*range(4095), 4094], impl="triton"), wanted)
    with pytest.raises(
        ValueError, match="triton takes banks of at most 4096 rows, got 4097; usable: native, reference"
    ):
        ops.duplicate_layers_(torch.ones(4097, 2), [0, 0], impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_the_version_counter_goes_up(impl):
    """Else backward of something that saved a row silently uses the new one."""
    bank = torch.randn(4, 8)
    x = torch.randn(4, 8, requires_grad=True)
    y = (x * bank).sum()
    before = bank._version
    ops.duplicate_layers_(bank, [0, 0], impl=impl)
    assert bank._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_bank_that_requires_grad():
    bank = torch.nn.Parameter(torch.randn(3, 4))
    wanted = oracle(bank.detach(), [0, 0])
    with pytest.raises(ValueError, match=r"bank requires grad .* torch.no_grad"):
        ops.duplicate_layers_(bank, [0, 0])
    with torch.no_grad():
        ops.duplicate_layers_(bank, [0, 0])
    assert torch.equal(bank.detach(), wanted) and bank.requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.duplicate_layers_(torch.ones(3, 4), [0, 0]), torch.ones(3, 4))


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_and_compile(impl):
    torch.library.opcheck(_duplicate_layers_, (torch.randn(5, 8), [0, 0, 1], impl))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def grown(bank):
        ops.duplicate_layers_(bank, [0, 0, 1], impl=impl)
        return bank * 2

    bank = torch.randn(5, 8)
    wanted = oracle(bank, [0, 0, 1])
    assert torch.equal(grown(bank), wanted * 2) and torch.equal(bank, wanted)


@pytest.mark.parametrize(
    ("bank", "layer_map", "error", "message"),
    [
        (torch.ones(3, 2), [0, 2], ValueError, r"layer_map\[1\] must be in 0..1, got 2"),
        (torch.ones(3, 2), [0, -1], ValueError, r"layer_map\[1\] must be in 0..1, got -1"),
        (torch.ones(3, 2), [0, 0, 0, 0], ValueError, "at most the 3 rows of bank, got 4"),
        (torch.ones(3, 2), [0, 0.5], TypeError, "float"),
        (torch.ones(()), [], ValueError, "got a scalar"),
        (torch.ones(3, 8)[:, ::2], [0, 0], ValueError, r"dense .*strides \[8, 2\]"),
        (torch.ones(8).expand(3, 8), [0, 0], ValueError, r"apart from the others, .*strides \[0, 1\]"),
    ],
)
def test_bad_arguments(bank, layer_map, error, message):
    with pytest.raises(error, match=message):
        ops.duplicate_layers_(bank, layer_map)


def several(device: str = "cpu") -> list[torch.Tensor]:
    """Weights and moments, part of a wider bank, a copy in bfloat16, step counts, and nothing."""
    wide = torch.randn(6, 50, device=device)
    return [wide.clone(), wide[:5, 8:40], wide.clone().bfloat16(), torch.arange(6.0, device=device), wide[:, :0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layer_map", [[0, 0, 1, 1, 2], [0, 1, 2], []], ids=str)
def test_several_banks(impl, layer_map):
    banks = several()
    wanted, versions = [oracle(bank, layer_map) for bank in banks], [bank._version for bank in banks]
    ops.duplicate_banks_(banks, layer_map, impl=impl)
    assert all(torch.equal(bank, exact) for bank, exact in zip(banks, wanted, strict=True))
    assert all(bank._version > before for bank, before in zip(banks, versions, strict=True))
    torch.library.opcheck(_duplicate_banks_, (several(), layer_map, impl))


@pytest.mark.parametrize(
    ("banks", "message"),
    [
        ([], "banks must name at least one tensor"),
        ([torch.zeros(3, 4), torch.zeros(2, 4)], r"at most the 2 rows of banks\[1\], got 3"),
        ([torch.zeros(3, 4), torch.zeros(4, 3).t()], r"each row of banks\[1\] must be dense"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, device="meta")], r"banks\[1\] must be on cpu as banks\[0\], got meta"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)], r"banks\[1\] requires grad"),
    ],
)
def test_several_banks_refused(banks, message):
    with pytest.raises(ValueError, match=f"duplicate_layers_: .*{message}"):
        ops.duplicate_banks_(banks, [0, 0, 1])


def test_cuda_is_offered_only_where_it_was_built():
    offered = ops.available()["duplicate_layers_"]
    assert offered["cpu"] == ["native", "reference"]
    assert ("native" in offered["cuda"]) == (WHY_NO_NATIVE_CUDA is None)


@pytest.mark.skipif(
    bool(WHY_NO_NATIVE_CUDA) or _C.cuda_available(), reason="wants CUDA kernels, and no device for them"
)
def test_without_a_driver_the_error_names_the_op_and_the_call():
    bank = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="duplicate_layers_: cudaDeviceGetAttribute failed: cudaError"):
        _C.duplicate_layers_cuda([(bank.data_ptr(), 16, 16)], [0, 0], 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("impl", ops.available()["duplicate_layers_"]["cuda"])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(12, 1 << 20, torch.float32), (300, 1001, torch.bfloat16), (7, 33, torch.uint8)]
)
def test_cuda(impl, rows, columns, dtype):
    """16-byte, 2-byte and 1-byte vectors; more rows than one launch takes."""
    bank = torch.randint(0, 100, (rows, columns), device="cuda").to(dtype)
    layer_map = [i // 2 for i in range(rows)]
    wanted = oracle(bank, layer_map)
    assert torch.equal(ops.duplicate_layers_(bank, layer_map, impl=impl), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("impl", ops.available()["duplicate_layers_"]["cuda"])
def test_cuda_several_banks(impl):
    banks = several("cuda")
    wanted = [oracle(bank, [0, 0, 1, 1, 2]) for bank in banks]
    ops.duplicate_banks_(banks, [0, 0, 1, 1, 2], impl=impl)
    assert all(torch.equal(bank, exact) for bank, exact in zip(banks, wanted, strict=True))
