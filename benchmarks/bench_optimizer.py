"""adamw_, lamb_, lans_: a step over all parameters of BERT. The layers are one bank [L, P]; peers get them as the tensors that a model has.

L layers, C hidden size, V words. Parameters, gradients and moments are float32; with copies=bf16 the step writes the new weights in
bfloat16, too. global_norm: of all those gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stackbert_kernels import ops

from .harness import STEP, Absent, Bench, Call, Case, Inputs, Peer
from .peers import gpu_module

NUMBERS = {"lr": 1e-4, "weight_decay": 0.01, "eps": 1e-8}
LAYERWISE = {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-6}
BETAS = (0.9, 0.999)
STEPS = 100  # taken before
STATE = ("exp_avg", "exp_avg_sq")
SPREAD = {"weight": 0.02, "grad": 1e-3, "exp_avg": 1e-3, "exp_avg_sq": 1e-3}  # as in training; the last is squared


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [_case("tiny", 2, 8, 20, 16)]
    if device == "cpu":
        return [_case("11M parameters", 4, 256, 30522, 512)]
    return [
        _case("110M parameters", 12, 768, 30522, 512, main=True),
        _case("336M parameters", 24, 1024, 30522, 512),
        _case("110M parameters", 12, 768, 30522, 512, copies="bf16"),
    ]


def _case(name: str, L: int, C: int, V: int, S: int, copies: str = "none", **rest) -> Case:
    sizes = {"L": L, "C": C, "V": V, "S": S}
    return Case(name, sizes, torch.float32, directions=(STEP,), options={"copies": copies}, **rest)


def layer_shapes(C: int) -> tuple[list[int], list[int]]:
    """Elements of a layer's tensors, in the order of a bank's row: with weight decay (qkv, out, up, down) and without (biases, norms)."""
    return [3 * C * C, C * C, 4 * C * C, 4 * C * C], [3 * C, C, 4 * C, C, C, C, C, C]


def other_shapes(case: Case) -> dict[str, tuple[tuple[int, ...], bool]]:
    """{name: (shape, with weight decay)}: embeddings, pooler, and the head behind the tied decoder."""
    C, V, S = case["C"], case["V"], case["S"]
    matrices = {"word": (V, C), "position": (S, C), "token_type": (2, C), "pooler": (C, C), "transform": (C, C)}
    vectors = {
        "norm": (2 * C,),
        "pooler_bias": (C,),
        "transform_bias": (C,),
        "head_norm": (2 * C,),
        "decoder_bias": (V,),
    }
    return {name: (shape, True) for name, shape in matrices.items()} | {
        name: (shape, False) for name, shape in vectors.items()
    }


def parameters(case: Case) -> dict[str, tuple[tuple[int, ...], int]]:
    """{name: (shape, elements with weight decay, of each row of the bank)}, as ours take them."""
    decayed, others = map(sum, layer_shapes(case["C"]))
    return {"bank": ((case["L"], decayed + others), decayed)} | {
        name: (shape, torch.Size(shape).numel() if decays else 0)
        for name, (shape, decays) in other_shapes(case).items()
    }


def elements(case: Case) -> int:
    return sum(torch.Size(shape).numel() for shape, _ in parameters(case).values())


def inputs(case: Case, device: str) -> Inputs:
    def random(shape: tuple[int, ...], kind: str) -> Tensor:
        x = torch.randn(shape, device=device).mul_(SPREAD[kind])
        return x.square_() if kind == "exp_avg_sq" else x

    return {
        f"{n}.{k}": random(shape, k) for n, (shape, _) in parameters(case).items() for k in ("weight", "grad", *STATE)
    }


def written(t: Inputs, copies: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in t.items() if not name.endswith(".grad")} | copies


def copies_of(case: Case, t: Inputs) -> dict[str, Tensor]:
    """The bfloat16 tensors that get the new weights, by name; none where the case has none."""
    wanted = parameters(case) if case.options.get("copies") == "bf16" else ()
    return {f"{name}.copy": torch.zeros_like(t[f"{name}.weight"], dtype=torch.bfloat16) for name in wanted}


def step_of_ours(case: Case, t: Inputs, step, **options) -> Call:
    """step(...) as ops.adamw_ takes it."""
    names, copies = parameters(case), copies_of(case, t)
    tensors = [[t[f"{name}.{kind}"] for name in names] for kind in ("weight", "grad", *STATE)]
    device = tensors[0][0].device
    steps = [torch.full((case["L"],) if name == "bank" else (), float(STEPS), device=device) for name in names]
    decay = [decayed for _, decayed in names.values()]

    def call():
        step(*tensors, steps, decay, beta1=BETAS[0], beta2=BETAS[1], copies=list(copies.values()), **options)
        return written(t, copies)

    return call


def ours(case: Case, t: Inputs, impl: str) -> Call:
    return step_of_ours(case, t, ops.adamw_, **NUMBERS, impl=impl)


def model_tensors(case: Case, t: Inputs, kind: str) -> list[tuple[Tensor, bool]]:
    """(tensor, with weight decay) of each tensor that a model has: views, so that what a peer writes is seen in t."""
    decayed, others = layer_shapes(case["C"])
    tensors = [
        (part, i < len(decayed)) for row in t[f"bank.{kind}"] for i, part in enumerate(row.split([*decayed, *others]))
    ]
    return tensors + [(t[f"{name}.{kind}"], decays) for name, (_, decays) in other_shapes(case).items()]


def step_of(case: Case, t: Inputs, make) -> Call:
    """A step of the optimizer make(groups), whose parameters and state are those of t."""
    views = {kind: model_tensors(case, t, kind) for kind in ("weight", "grad", *STATE)}
    values = [torch.nn.Parameter(w) for w, _ in views["weight"]]
    for value, (grad, _) in zip(values, views["grad"], strict=True):
        value.grad = grad
    groups = [
        {"params": [v for v, (_, d) in zip(values, views["weight"], strict=True) if d == decays], "weight_decay": decay}
        for decays, decay in ((True, NUMBERS["weight_decay"]), (False, 0.0))
    ]
    optimizer = make(groups)
    for i, value in enumerate(values):
        optimizer.state[value].update({kind: views[kind][i][0] for kind in STATE})
    copies = copies_of(case, t)
    copied_from = [t[name.replace(".copy", ".weight")] for name in copies]

    def call():
        optimizer.step()
        if copies:
            torch._foreach_copy_(list(copies.values()), copied_from)
        return written(t, copies)

    return call


def torch_adamw(**how):
    """torch.optim.AdamW; without arguments as it chooses for itself."""

    def make(case: Case, t: Inputs) -> Call:
        cuda = t["word.weight"].is_cuda
        if cuda and how.get("foreach"):
            raise Absent('what "torch" takes by itself on a GPU')
        device = t["word.weight"].device if how.get("fused") else "cpu"

        def optimizer(groups):
            made = torch.optim.AdamW(groups, lr=NUMBERS["lr"], betas=BETAS, eps=NUMBERS["eps"], **how)
            for group in groups:
                for value in group["params"]:
                    made.state[value]["step"] = torch.tensor(float(STEPS), device=device)
            return made

        return step_of(case, t, optimizer)

    return make


def apex_adam(case: Case, t: Inputs) -> Call:
    fused = gpu_module("apex.optimizers.fused_adam", t).FusedAdam

    def optimizer(groups):
        made = fused(groups, lr=NUMBERS["lr"], betas=BETAS, eps=NUMBERS["eps"], adam_w_mode=True)
        for group in made.param_groups:
            group["step"] = STEPS
        return made

    return step_of(case, t, optimizer)


def bytes_moved(case: Case, direction: str) -> int:
    """Weights and both moments are read and written, gradients read, copies written."""
    return elements(case) * (28 + (2 if case.options["copies"] == "bf16" else 0))


ADAMW = Bench(
    op="adamw_",
    folder="optimizer",
    cases=cases,
    inputs=inputs,
    ours=ours,
    peers=(
        Peer("torch", torch_adamw()),
        Peer("torch fused", torch_adamw(fused=True)),
        Peer("torch foreach", torch_adamw(foreach=True)),
        Peer("apex", apex_adam),
    ),
    bytes_moved=bytes_moved,
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_optimizer.py",
)


def ours_by_parts(step):
    """lamb_ or lans_, each tensor of a layer a part of its row."""

    def make(case: Case, t: Inputs, impl: str) -> Call:
        matrices, vectors = layer_shapes(case["C"])
        others = (torch.Size(shape).numel() for shape, _ in other_shapes(case).values())
        rows = [[*matrices, *vectors], *([size] for size in others)]
        return step_of_ours(case, t, step, parts=rows, **LAYERWISE, impl=impl)

    return make


def torch_layerwise(lans: bool):
    """The formulas of csrc/optimizer/layerwise.h in plain PyTorch, tensor by tensor, without a wait for the device."""

    def make(case: Case, t: Inputs) -> Call:
        views = zip(*(model_tensors(case, t, kind) for kind in ("weight", "grad", *STATE)), strict=True)
        tensors = [(w, g, m, v, decays) for (w, decays), (g, _), (m, _), (v, _) in views]
        (beta1, beta2), lr, eps = BETAS, LAYERWISE["lr"], LAYERWISE["eps"]
        taken = [STEPS]

        def scaled(x: Tensor, w: Tensor, decays: bool) -> Tensor:
            if not decays:
                return x
            x = x.add(w, alpha=LAYERWISE["weight_decay"])
            own, length = w.norm(), x.norm()
            return x * torch.where((own > 0) & (length > 0), own / length, 1.0)

        def call():
            taken[0] += 1
            for w, g, m, v, decays in tensors:
                if lans:
                    length = g.norm()
                    g = g / torch.where(length > 0, length + eps, 1.0)
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                down = (v / (1 - beta2 ** taken[0])).sqrt_().add_(eps)
                change = scaled(m / (1 - beta1 ** taken[0]) / down, w, decays)
                if lans:
                    change = beta1 * change + (1 - beta1) * scaled(g / down, w, decays)
                w.sub_(change, alpha=lr)
            return written(t, {})

        return call

    return make


def layerwise(op: str, bytes_of_an_element: int) -> Bench:
    """The bytes are those of passes between which nothing stays on the chip: norms of whole tensors lie between them."""
    return Bench(
        op=op,
        folder="optimizer",
        cases=lambda device, quick: norm_cases(device, quick)[:1],
        inputs=inputs,
        ours=ours_by_parts(getattr(ops, op)),
        peers=(Peer("torch", torch_layerwise(op == "lans_")),),
        bytes_moved=lambda case, direction: bytes_of_an_element * elements(case),
        flops=lambda case, direction: 0,
        test="python_tests/ops/test_layerwise.py",
    )


LAMB, LANS = layerwise("lamb_", 40), layerwise("lans_", 48)


def norm_cases(device: str, quick: bool) -> list[Case]:
    """The sizes of adamw_'s cases, once each."""
    plain = [case for case in cases(device, quick) if case.options["copies"] == "none"]
    return [Case(case.name, case.sizes, torch.float32, directions=(STEP,)) for case in plain]


def gradients(case: Case, device: str) -> Inputs:
    shapes = parameters(case).items()
    return {f"{name}.grad": torch.randn(shape, device=device).mul_(SPREAD["grad"]) for name, (shape, _) in shapes}


def norm_by(norm) -> Callable[..., Call]:
    """norm(tensors) of the gradients: a tensor for the bank, as the trainer has it, and one for each other parameter."""

    def make(case: Case, t: Inputs, *rest) -> Call:
        return lambda: {"norm": norm(list(t.values()), *rest)}

    return make


GLOBAL_NORM = Bench(
    op="global_norm",
    folder="optimizer",
    cases=norm_cases,
    inputs=gradients,
    ours=norm_by(lambda tensors, impl: ops.global_norm(tensors, impl=impl)),
    peers=(Peer("torch", norm_by(torch.nn.utils.get_total_norm)),),
    bytes_moved=lambda case, direction: 4 * elements(case),
    flops=lambda case, direction: 0,
    test="python_tests/ops/test_optimizer.py",
)

BENCHES = (ADAMW, GLOBAL_NORM, LAMB, LANS)
