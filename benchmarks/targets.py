"""What the kernels are to reach on an H200: a goal for each, set by counting bytes, FLOPs and instructions before anything was measured.

Times are for 65,536 tokens in bf16. Where the arithmetic of an op is torch's (the products of the masked-LM loss), the target is for what is
left when that arithmetic runs at the rate of a large product of the same rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import table

GPU = "H200"
COPY, MATMUL = 4.3e12, 790e12  # its bytes a second in a large copy, FLOPs a second in a large bf16 product
FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward + backward", "step"
OF_COPY = 0.85


@dataclass(frozen=True)
class Target:
    """A time in us for each implementation, or a share of the ceiling.

    sizes, options   what the row must say of these
    beside_products  the time of the declared FLOPs, at the rate of a large product, comes on top
    """

    op: str
    direction: str
    us: Mapping[str, float] = field(default_factory=dict)
    share: float | None = None
    sizes: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    dtype: str = "bf16"
    p: float = 0.0
    beside_products: bool = False

    def means(self, row: Mapping) -> bool:
        return (
            (row["op"], row["direction"], row["dtype"], row["p"]) == (self.op, self.direction, self.dtype, self.p)
            and all(row["sizes"].get(name) == value for name, value in self.sizes.items())
            and all(row["options"].get(name) == value for name, value in self.options.items())
        )

    def seconds(self, impl: str, row: Mapping) -> float | None:
        """What `impl` may take for this row; shares and products by the row's own ceilings, else by those above."""
        ceilings = {"copy": COPY, "matmul": MATMUL} | dict(row.get("ceilings", {}))
        if self.share is not None:
            floor = table.floor({**row, "ceilings": ceilings})
            return floor / self.share if floor else None
        if impl not in self.us:
            return None
        return self.us[impl] / 1e6 + (row["flops"] / ceilings["matmul"] if self.beside_products else 0.0)

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.share:.0%} of copy"
        times = dict.fromkeys(self.us.values())
        named = [f"{us:g} us" + (f" ({impl})" if len(times) > 1 else "") for impl, us in self.us.items()]
        return " / ".join(named[:1] if len(times) == 1 else named) + (" + products" if self.beside_products else "")


def _either(us: float) -> dict[str, float]:
    return {"native": us, "triton": us}


def _attention(S: int, direction: str, us: Mapping[str, float]) -> Target:
    return Target("attention", direction, us, sizes={"H": 12, "S": S, "mix": "equal"}, p=0.1)


TARGETS = (
    _attention(128, FORWARD, _either(115)),
    _attention(128, BACKWARD, _either(230)),
    _attention(512, FORWARD, {"native": 295, "triton": 340}),
    _attention(512, BACKWARD, {"native": 720, "triton": 900}),
    Target("dropout_add_layer_norm", FORWARD, _either(106), sizes={"C": 768}, p=0.1),
    Target("dropout_add_layer_norm", BACKWARD, _either(110), sizes={"C": 768}, p=0.1),
    Target("masked_lm_loss", BOTH, _either(320), sizes={"C": 768}, options={"weight": "trained"}, beside_products=True),
    Target("bias_gelu", FORWARD, share=OF_COPY, sizes={"C": 3072}, options={"form": "erf"}),
    Target("bias_gelu", BACKWARD, share=OF_COPY, sizes={"C": 3072}, options={"form": "erf"}),
    Target("duplicate_layers_", STEP, share=OF_COPY, sizes={"L": 6}, dtype="fp32"),
    Target("adamw_", STEP, share=OF_COPY, sizes={"C": 768}, options={"copies": "none"}, dtype="fp32"),
)


def of(row: Mapping) -> Target | None:
    return next((target for target in TARGETS if target.means(row)), None)


def judged(rows: Sequence[Mapping]) -> list[dict[str, object]]:
    """A line for each target and each implementation of it that was measured: met, or missed by how much. Not measured: a line too."""
    lines = []
    for target in TARGETS:
        row = next((row for row in rows if target.means(row)), None)
        line = {
            "op": target.op,
            "case": table.case_name(row) if row else None,
            "pass": target.direction,
            "target": str(target),
        }
        times = (
            {impl: row["seconds"][impl]["median"] for impl in table.OURS[:2] if impl in row["seconds"]} if row else {}
        )
        for impl, measured in times.items():
            allowed = target.seconds(impl, row)
            verdict = "met" if measured <= allowed else f"missed by {measured / allowed - 1:.0%}"
            lines.append(line | {"impl": impl, "allowed us": 1e6 * allowed, "us": 1e6 * measured, "": verdict})
        wrong = [impl for impl in table.OURS[:2] if row and impl in row["wrong"]]
        lines += [line | {"impl": impl, "allowed us": None, "us": None, "": "wrong: no time"} for impl in wrong]
        if not times and not wrong:
            lines.append(line | {"impl": None, "allowed us": None, "us": None, "": "not measured"})
    return lines
