"""Pallas kernels: arrays, layouts and tile sizes, and nothing of what they are used for.

One folder holds one kernel, one file in it one backend (Triton, Mosaic GPU, TPU). The package imports nothing from
`jattn`; the engines `jattn.softmax` and `jattn.recurrence` choose among the kernels and check their arguments.
"""
