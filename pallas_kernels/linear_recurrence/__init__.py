"""Linear recurrences between chunks: what a state goes through, given the matrices of each chunk.

`parts.py` says what a chunk is made of; `triton.py` and `tpu.py` hold a state on the chip while they walk along the
chunks, forward and, for gradients, backward.
"""
