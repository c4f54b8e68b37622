"""Mechanisms whose weights come from the softmax engine: normalizers, score modifications, virtual keys, pooled tokens."""
