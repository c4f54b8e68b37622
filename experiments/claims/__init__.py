"""Reproductions of what papers claim, one file each: `python -m experiments.claims list | run NAME [--quick]`.

A file ends with `CLAIM = Claim(...)`: paper, claim, setting, expected direction, and a function that measures. The
verdict follows from the measured numbers by a rule that the file states; whatever it is, it is written down.
"""
