"""embedding_layer_norm: y = dropout(layer_norm(word[ids] + position[positions] + token_type[token_types])).

T tokens, C columns, V words, S positions. Tables are float32, y is in the dtype of the case. The ids are as frequent as words are (Zipf).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stackbert_kernels import ops

from .harness import BACKWARD, BOTH, FORWARD, FROZEN, Bench, Call, Case, Inputs, Peer
from .peers import compiled

EPS = 1e-12
INDICES, TABLES = ("ids", "positions", "token_types"), ("word", "position", "token_type")


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case(24, 64, 50, 8, torch.bfloat16 if device == "cuda" else torch.float32, 0.1)]
    if device == "cpu":
        return [
            _case(4096, 768, 30528, 128, dtype, 0.1, directions=(BOTH,)) for dtype in (torch.float32, torch.bfloat16)
        ]
    return [
        _case(65536, 768, 30528, 128, torch.bfloat16, 0.1, directions=(FORWARD, BACKWARD, FROZEN), main=True),
        _case(65536, 1024, 30528, 128, torch.bfloat16, 0.1),
        _case(65536, 768, 30528, 512, torch.bfloat16, 0.0),
    ]


def _case(T: int, C: int, V: int, S: int, dtype: torch.dtype, p: float, **rest) -> Case:
    return Case(f"{T} x {C} of {V}, S = {S}", {"T": T, "C": C, "V": V, "S": S}, dtype, p, **rest)


def inputs(case: Case, device: str) -> Inputs:
    T, C, V, S = (case[size] for size in "TCVS")
    word, position, token_type, weight, bias = (
        torch.randn(*shape, device=device).requires_grad_() for shape in ((V, C), (S, C), (2, C), (C,), (C,))
    )
    token = torch.arange(T, device=device)
    return {
        "word": word, "position": position, "token_type": token_type, "weight": weight, "bias": bias,
        "ids": (V ** torch.rand(T, device=device)).long().sub_(1).clamp_(0, V - 1),
        "positions": token % S, "token_types": token % S * 2 // S,
        "rng": ops.new_rng(0, device=device), "grad": torch.randn(T, C, device=device).to(case.dtype),
    }  # fmt: skip


def _tensors(t: Inputs) -> list[torch.Tensor]:
    return [t[name] for name in (*INDICES, *TABLES, "weight", "bias")]


def ours(case: Case, t: Inputs, impl: str) -> Call:
    dtype = case.dtype if t["word"].dtype == torch.float32 else None  # float64 tables are the truth: it is not rounded
    return lambda: ops.embedding_layer_norm(
        *_tensors(t), dropout_p=case.p, rng=t["rng"], eps=EPS, dtype=dtype, impl=impl
    )


def composite(ids, positions, token_types, word, position, token_type, weight, bias, p: float, dtype: torch.dtype):
    z = F.embedding(ids, word) + F.embedding(positions, position) + F.embedding(token_types, token_type)
    return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, EPS), p).to(dtype)


def by(function):
    return lambda case, t: lambda: function(*_tensors(t), case.p, case.dtype)


def bytes_moved(case: Case, direction: str) -> int:
    """forward reads the indices and each row of the tables once and writes y and two statistics; backward reads these, the rows and dy
    and writes the gradient of every table, whole. weight and bias are small, and the dropout mask is drawn again."""
    T, C, V, S = (case[size] for size in "TCVS")
    indices, rows, statistics = 3 * 8 * T, 4 * C * (min(T, V) + S + 2), 8 * T
    y, gradients = T * C * case.dtype.itemsize, 4 * C * (V + S + 2)
    frozen = indices + rows + y
    forward, backward = frozen + statistics, frozen + statistics + gradients
    return {FROZEN: frozen, FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


EMBEDDING = Bench(
    op="embedding_layer_norm",
    folder="embedding",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(Peer("torch", by(composite)), Peer("torch.compile", compiled(composite, by))),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_embedding.py",
)

BENCHES = (EMBEDDING,)
