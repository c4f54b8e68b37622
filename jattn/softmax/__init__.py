"""Engine 1: dense, masked, biased and block-sparse attention with any normalizer."""
