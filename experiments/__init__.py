"""Scripts that train, compare and measure: `python -m experiments.NAME --help`. They run from the checkout."""
