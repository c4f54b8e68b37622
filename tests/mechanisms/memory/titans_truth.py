"""What the architectures of Titans are made of, in plain form: dense attention and the gate, in float64 numpy."""

import numpy as np


def attention(layer, queries, keys, visible, query_places=None, key_places=None):
    """Softmax attention of a layer's `MultiHeadAttention` `[B, T, M]` under a boolean `[T, S]`; per-head outputs."""
    project = layer.attention
    query, key, value = (
        np.einsum("btm,mhd->bthd", x, p.kernel[...])
        for x, p in ((queries, project.query), (keys, project.key), (keys, project.value))
    )
    if project.position is not None:
        query = project.position.rotate(query, query, query_places, query_places)[0]
        key = project.position.rotate(key, key, key_places, key_places)[1]
    groups = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, groups, axis=2) for x in (key, value))
    logits = np.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * visible
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), value)


def mixed(layer, heads):
    """W_o of the attention."""
    return np.einsum("bthd,hdm->btm", heads, layer.attention.out.kernel[...])


def gate(layer, y, m):
    """Both branches normalized, the memory's through a sigmoid."""

    def norm(x, weights):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights.scale[...]

    return norm(y, layer.gate.attention_norm) / (1 + np.exp(-norm(m, layer.gate.memory_norm)))


def perturb(layer, seed=0):
    """Norm weights other than one, and persistent tokens that matter."""
    random = np.random.default_rng(seed)
    for module in (getattr(layer, "gate", None),):
        if module is not None:
            for norm in (module.attention_norm, module.memory_norm):
                norm.scale[...] = norm.scale[...] * random.uniform(0.5, 1.5, norm.scale[...].shape)
    layer.persistent[...] = random.normal(size=layer.persistent[...].shape)
    return layer
