"""Mechanisms on the softmax engine: normalizers, score modifications, virtual keys, pooled tokens."""
