"""Where a patch lies: fixed two-dimensional sine-cosine positions, and positions of one grid resampled to another.

Half of the width codes the column, half the row; each half is sines, then cosines, of the coordinate at wavelengths
from 2π to 10000·2π. The class token stands first and has position 0. The order (column first) is the one of the
public MAE weights.

Source: MAE, arXiv 2111.06377, section 3 and appendix A.1; MoCo v3, arXiv 2104.02057.
"""

from __future__ import annotations

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed


def sincos_positions(width: int, grid: int) -> torch.Tensor:
    """Positions of a class token and `grid` x `grid` patches, row by row: float32 `[1, 1 + grid², width]`.

    `width` is a multiple of 4: sine and cosine of column and row. Computed in float64.
    """
    assert width % 4 == 0, width
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))  # [width / 4]
    rows, columns = np.divmod(np.arange(grid * grid), grid)  # [grid²] each
    table = np.zeros((1 + grid * grid, width))
    halves = []
    for coordinate in (columns, rows):
        angle = np.multiply.outer(coordinate, frequency)  # [grid², width / 4]
        halves += [np.sin(angle), np.cos(angle)]
    table[1:] = np.concatenate(halves, axis=1)
    return torch.from_numpy(table).float().unsqueeze(0)


def on_grid(positions: torch.Tensor, *, old: int, new: int) -> torch.Tensor:
    """`positions` `[1, 1 + old², width]` resampled to `[1, 1 + new², width]`, the class token's kept.

    Bicubic without antialiasing, as MAE's and LiVT's codes go from 224 to 384 px.
    """
    return resample_abs_pos_embed(positions, [new, new], [old, old], num_prefix_tokens=1, antialias=False)
