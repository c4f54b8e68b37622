"""Attention of one new token: the keys are split among programs, the heads of a group share a tile.

Each program leaves a partial output and its log-sum-exp, which `joining.py` joins. Keys and values lie in a cache of
each row's own, or in pages of a pool that a table names (`pages.py`). `triton.py` is the backend for NVIDIA GPUs,
`tpu.py` the one for TPUs; what happens between the products is given as for `pallas_kernels.flash_attention`.
"""
