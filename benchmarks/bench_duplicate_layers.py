"""duplicate_layers_ against the machine's copy bandwidth: 6 layers of BERT-base become 12, [0..5] -> [0..5, 0..5]."""

from __future__ import annotations

import torch
from timing import arguments, compare, report, speedup

from stackbert_kernels import ops

BERT_BASE_LAYER = 7_087_872  # parameters of one encoder layer
SHAPES = [(6, BERT_BASE_LAYER), (3, BERT_BASE_LAYER), (6, 200_000)]  # rows that are copied, elements of a row


def bytes_moved(rows: int, columns: int) -> int:
    return 2 * rows * columns * 4  # read the lower rows, write the upper ones


def main() -> None:
    options = arguments(__doc__)
    table = []
    for rows, columns in SHAPES:
        bank = torch.randn(2 * rows, columns)
        layer_map = list(range(rows)) * 2
        lower, upper = bank[:rows], bank[rows:]
        wanted = bank[layer_map]
        if not torch.equal(ops.duplicate_layers_(bank, layer_map), wanted):
            raise SystemExit("duplicate_layers_ is wrong: nothing is timed")
        stats = compare(
            {
                "native": lambda bank=bank, layer_map=layer_map: ops.duplicate_layers_(bank, layer_map, impl="native"),
                "reference": lambda bank=bank, layer_map=layer_map: ops.duplicate_layers_(
                    bank, layer_map, impl="reference"
                ),
                "copy": lambda lower=lower, upper=upper: upper.copy_(lower),
            },
            repeats=options.repeats,
        )
        table.append(
            {
                "rows x elements": f"{rows} x {columns}",
                "native ms": 1e3 * stats["native"].median,
                "native GB/s": bytes_moved(rows, columns) / stats["native"].median / 1e9,
                "copy GB/s": bytes_moved(rows, columns) / stats["copy"].median / 1e9,
                "share of copy": speedup(stats, "copy", "native").median,
                "share p20": speedup(stats, "copy", "native").p20,
                "against reference": speedup(stats, "reference", "native").median,
            }
        )
    report(table, options.json)


if __name__ == "__main__":
    main()
