"""Attention of one new token: the keys are split among programs, the heads of a group share a tile.

Each program leaves a partial output and its log-sum-exp, which are joined afterwards. `triton.py` is the backend for
NVIDIA GPUs; what happens between the products is given as for `pallas_kernels.flash_attention`.
"""
