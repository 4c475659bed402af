"""Finds rows of a matrix whose square submatrix has a nearly maximal volume."""

from __future__ import annotations

import torch
from torch import Tensor

#: Entries of the interpolation matrix may be this large; 1 would be the exact local maximum.
_LARGEST = 1.02


def maxvol(matrix: Tensor, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Choose rows so that all rows are combinations of them with small coefficients.

    The first choice is that of elimination with pivots; then rows are exchanged while the volume of the
    submatrix grows (Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin 2010).

    Args:
        matrix: (n, r) with n >= r and independent columns.
        steps: the largest number of exchanges.

    Returns:
        The positions of r rows; and coefficients (n, r) with ``matrix = coefficients @ matrix[rows]``, whose
        entries are at most 1.02 in size unless the steps ran out.
    """
    r = matrix.shape[1]
    _, pivots = torch.linalg.lu_factor(matrix)
    rows = torch.arange(len(matrix), device=matrix.device)
    for k, pivot in enumerate((pivots - 1).tolist()):
        rows[[k, pivot]] = rows[[pivot, k]]
    rows = rows[:r].clone()
    coefficients = torch.linalg.solve(matrix[rows].mT, matrix.mT).mT
    for _ in range(steps):
        place = int(coefficients.abs().argmax())
        row, column = divmod(place, r)
        pivot = coefficients[row, column].clone()
        if pivot.abs() <= _LARGEST:
            break
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients -= torch.outer(coefficients[:, column] / pivot, change)
        rows[column] = row
    return rows, coefficients
