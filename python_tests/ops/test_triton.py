"""Where Triton can run and what is said where it cannot; device functions against their statement in PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stackbert_kernels import ops
from stackbert_kernels.ops import _library, _triton, philox

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

from stackbert_kernels.ops._triton_language import attention_kept, dropout_key, row_bytes  # noqa: E402

X = torch.ones(3, 4)
RNG = ops.new_rng(2**40 + 7, 2**33 + 5)


@pytest.fixture
def on_gpu(monkeypatch):
    """What would be said of tensors on a GPU."""

    monkeypatch.setattr(_triton, "capability", lambda index: (9, 0))
    with FakeTensorMode():
        return torch.empty(3, 4, device="cuda:0")


def dropout_op() -> _library.Op:
    return next(op for op in ops.OPS if op.name == "dropout")


def test_auto_takes_triton_on_a_gpu_without_the_compiled_module(on_gpu, monkeypatch):
    monkeypatch.setattr(_library, "WHY_NO_NATIVE_CUDA", "built without CUDA")
    explanation = dropout_op().explain(on_gpu)
    assert explanation.chosen == "triton" == dropout_op().resolve("auto", on_gpu)
    assert "native" in explanation.why_not


def test_auto_takes_triton_on_a_gpu_that_the_compiled_module_was_not_built_for(on_gpu, monkeypatch):
    reason = "the device is sm_103, this module was built for 80-real"
    monkeypatch.setattr(_library, "WHY_NO_NATIVE_CUDA", None)
    monkeypatch.setattr(_library, "_why_no_machine_code", lambda index: reason)
    assert dropout_op().resolve("auto", on_gpu) == "triton"
    assert dropout_op().explain(on_gpu).why_not["native"] == reason
    assert "native" not in dropout_op().available()["cuda"]
    with pytest.raises(
        ValueError, match=f"dropout: impl='native' cannot run here: {reason}; usable: triton, reference"
    ):
        dropout_op().resolve("native", on_gpu)


@pytest.mark.parametrize("reason", [None, "another GPU"])
def test_which_gpu_it_is_is_asked_while_torch_compile_traces(monkeypatch, reason):
    """The compiled module's functions cannot be traced: without the mark this breaks the graph."""
    monkeypatch.setattr(_library, "_why_no_machine_code", lambda index: [reason, _library._C.cuda_archs()][0])
    torch.compiler.reset()  # what was traced with another answer
    compiled = torch.compile(
        lambda x: x + 1 if _library.why_no_machine_code(0) is None else x, fullgraph=True, backend="eager"
    )
    assert compiled(X)[0, 0] == (2 if reason is None else 1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"version": lambda: None}, "Triton is not installed, wanted 3.6 or newer"),
        ({"version": lambda: "3.5.1"}, "wanted Triton 3.6 or newer, got 3.5.1"),
        ({"version": lambda: "3.10.0+git1234"}, None),
        ({"version": lambda: "4.0"}, None),
        ({"capability": lambda index: (7, 5)}, r"compute capability 8.0 \(Ampere\) or newer, got 7.5"),
        ({"capability": lambda index: (12, 0)}, None),
    ],
)
def test_what_is_missing_on_a_gpu(on_gpu, monkeypatch, broken, message):
    monkeypatch.setattr(_library, "WHY_NO_NATIVE_CUDA", "built without CUDA")
    for name, value in broken.items():
        monkeypatch.setattr(_triton, name, value)
    if message is None:
        assert dropout_op().resolve("triton", on_gpu) == "triton"
        return
    with pytest.raises(ValueError, match=f"dropout: impl='triton' cannot run here: .*{message}; usable: .*reference"):
        dropout_op().resolve("triton", on_gpu)
    explanation = dropout_op().explain(on_gpu)
    assert explanation.chosen == "reference"
    assert "triton" not in dropout_op().available()["cuda"] or "capability" in broken


def test_on_the_cpu_it_is_for_tests_and_never_taken_by_auto(monkeypatch):
    assert dropout_op().resolve("auto", X) == "native"
    assert dropout_op().available()["cpu"] == ["native", "reference"]
    assert "for tests" in ops.explain("dropout", X).why_not["triton"]
    monkeypatch.setattr(_library, "WHY_NO_NATIVE", "not built")
    assert dropout_op().resolve("auto", X) == "reference"
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match="Triton takes CPU tensors only under TRITON_INTERPRET=1, for tests; usable: reference"
    ):
        ops.dropout(X, 0.1, impl="triton")


def test_float64_is_not_for_triton():
    with pytest.raises(ValueError, match="triton takes float32, bfloat16 and float16, got float64"):
        ops.dropout(X.double(), 0.1, impl="triton")


def test_triton_is_imported_only_when_a_kernel_is_called():
    code = """
import sys, torch
from stackbert_kernels import ops
x = torch.ones(2, 3)
ops.available(), ops.explain("dropout", x), ops.dropout(x, 0.5)
assert "triton" not in sys.modules
ops.dropout(x, 0.5, impl="triton")
assert "triton" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configurations_of_the_nearest_older_architecture(monkeypatch):
    table = {80: "a", 90: "b", 100: "c"}
    for found, want in (((8, 0), "a"), ((8, 9), "a"), ((9, 0), "b"), ((10, 0), "c"), ((10, 3), "c"), ((12, 0), "c")):
        monkeypatch.setattr(_triton, "capability", lambda index, found=found: found)
        assert _triton.configuration(table, torch.device("cuda", 0)) == want
    assert _triton.configuration(table, torch.device("cpu")) == "a"


@triton.jit(do_not_specialize=["site", "first_row"])
def row_bytes_kernel(
    out_ptr,
    rng_ptr,
    site,
    first_row,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    k0, k1 = dropout_key(rng_ptr, site)
    r = tl.arange(0, ROWS)
    drawn = row_bytes(k0, k1, tl.cast(first_row, tl.int64) + r, FIRST, COLUMNS, GROUP)
    tl.store(out_ptr + r[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], drawn.to(tl.int64))


@pytest.mark.parametrize("group", [4, 8, 16])
@pytest.mark.parametrize("site", [0, 1, 2**32 - 1])
def test_row_bytes(site, group):
    out = torch.full((8, 64), -1)
    row_bytes_kernel[(1,)](out, RNG, site, 3, 8, 32, 64, group)
    assert torch.equal(out, philox.row_bytes(RNG, site, 11, 96)[3:, 32:])


def test_rows_beyond_32_bits_have_masks_of_their_own():
    """Token 2^32 + 3 is not token 3."""
    out = torch.full((2, 8, 32), -1)
    for half, first in zip(out, (0, 2**32), strict=True):
        row_bytes_kernel[(1,)](half, RNG, 3, first, 8, 0, 32, 8)
    k0, k1 = philox.subkey(RNG, 3)
    token = torch.arange(8)[:, None]
    words = philox.philox(
        k0,
        k1,
        torch.arange(2)[None, :],
        token,
        torch.ones(1, 1, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.int64),
    )
    want = torch.stack(torch.broadcast_tensors(*words), -1)  # [R, 2, 4]
    want = (want[..., None] >> (8 * torch.arange(4))) & 0xFF
    assert torch.equal(out[1], want.flatten(1)) and torch.equal(out[0], philox.row_bytes(RNG, 3, 8, 32))


@triton.jit(do_not_specialize=["site", "sequence", "head", "threshold"])
def attention_kept_kernel(
    out_ptr, rng_ptr, site, sequence, head, threshold, FIRST_QUERY: tl.constexpr, QUERIES: tl.constexpr, FIRST: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    k0, k1 = dropout_key(rng_ptr, site)
    m = tl.arange(0, QUERIES)
    kept = attention_kept(k0, k1, sequence, head, FIRST_QUERY + m, FIRST, threshold, KEYS)
    tl.store(out_ptr + m[:, None] * KEYS + tl.arange(0, KEYS)[None, :], kept)


@pytest.mark.parametrize(("first", "keys"), [(0, 64), (0, 128), (64, 64), (128, 64)])
def test_attention_kept(first, keys):
    for sequence, head, threshold in ((0, 0, 1), (1, 1, 26), (5, 2, 255)):
        out = torch.zeros((16, keys), dtype=torch.bool)
        attention_kept_kernel[(1,)](out, RNG, 2**32 - 1, sequence, head, threshold, 8, 16, first, keys)
        want = philox.attention_bytes(RNG, 2**32 - 1, sequence, 3, 24, 192)[head, 8:, first : first + keys]
        assert torch.equal(out, want >= threshold)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n):
    total = tl.load(x_ptr) * 0
    for i in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        total += tl.load(x_ptr + i)
    tl.store(out_ptr, total)


def test_numbers_of_a_kernel_bound_its_loops():
    """In the interpreter too, whatever NumPy it has."""
    out = torch.zeros(1)
    sum_kernel[(1,)](torch.arange(5.0), out, 5)
    assert out.item() == 10
