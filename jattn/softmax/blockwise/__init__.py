"""The blockwise implementation: tiles in plain JAX, memory linear in T and S forward and backward, on every platform.

forward: one pass over the live tiles with an online softmax (or plain sums for pointwise normalizers). Derivatives:
with phi_ij = exp(logit_ij - lse_i) the tangent of (out, lse) is

    d lse_i = sum_j phi_ij d logit_ij,      d out_i = sum_j (phi_ij v_j)' - d lse_i out_i,

two sums over the same tiles with lse held fixed. So one linear map per tile serves forward mode, and its transpose,
written by hand as a second pass over the same lists, serves reverse mode; both come from `tiles.tile_terms` by JAX's
own differentiation, with nothing saved but out and lse. Second derivatives go through a checkpointed scan.
"""

from jattn.softmax.blockwise.core import attend

__all__ = ["attend"]
