"""Fused attention: one pass over the live tiles of the score matrix, forward and backward, without atomics.

What happens to a logit between the two products is given as functions (`Pipeline`) of the tile and of what it reads
(`TileInput`), so one kernel serves masks, biases, score functions, dropout and every pointwise normalizer. Which tiles
are visited is given as lists (`TileLists`). `pipeline.py` holds these types, `sizes.py` picks tile sizes, and there is
one file for each backend.
"""
