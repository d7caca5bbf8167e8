"""The order in which implementations for a GPU sum the gradients of a table: tokens by the row that they read."""

import torch
from torch import Tensor


def sorted_by_row(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(rows in ascending order, the token that reads each): ties in the order of the tokens; -1 or `rows` where out of range.

    Few bits to sort by, and none of the indices out of range may become one inside.
    """
    narrow = torch.int16 if rows < torch.iinfo(torch.int16).max else torch.int32
    row, token = torch.sort(index.clamp(-1, rows).to(narrow), stable=True)
    return row, token
