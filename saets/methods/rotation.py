"""The orthogonal matrix that turns decoder rows towards the columns of M (paper, appendix D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saets.errors import InputError
from saets.shapes import Float


def procrustes(W_dec: Float[Tensor, "d_sae d_in"], M: Float[Tensor, "d_model features"]) -> Float[Tensor, "d_model d_model"]:
    """Q of the least sum_j ||Q u(d_j) - u(m_j)||^2 over all orthogonal matrices, reflections among them; applied as Q d.

    sum_j u(m_j) u(d_j)' = U S V' gives Q = U V'. A feature without a column in M, or without a decoder row, counts for nothing.

    Raises:
        InputError: decoder and M of different shapes.
    """
    if W_dec.shape != M.T.shape:
        raise InputError(f"the SAE's decoder is {list(W_dec.shape)} and M is {list(M.shape)}; they belong to different SAEs")
    U, _, Vh = torch.linalg.svd((normalize(M, dim=0) @ normalize(W_dec.float(), dim=1)).double())
    return (U @ Vh).float()
