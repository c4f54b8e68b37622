"""A memory that learns while it is read, as loops in float64 numpy: one matrix for every moment, gradients by hand."""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_slope(x):
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def answer(weights, x, residual=False):
    """M(x; W) for one token, x `[D]`."""
    hidden = x
    for i, matrix in enumerate(weights):
        hidden = hidden @ matrix
        hidden = gelu(hidden) if i + 1 < len(weights) else hidden
    if not residual:
        return hidden
    return x + (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)


def gradients(weights, key, value, residual=False):
    """Of |M(key) - value|^2, one matrix for each of the weights."""
    inputs, sums, hidden = [], [], key
    for i, matrix in enumerate(weights):
        inputs.append(hidden)
        sums.append(hidden @ matrix)
        hidden = gelu(sums[-1]) if i + 1 < len(weights) else sums[-1]
    error = 2 * (answer(weights, key, residual) - value)
    if residual:
        root = np.sqrt(hidden.var() + 1e-5)
        unit = (hidden - hidden.mean()) / root
        width = hidden.size
        error = (width * error - error.sum() - unit * (error * unit).sum()) / (width * root)
    found = []
    for i in reversed(range(len(weights))):
        found.insert(0, np.outer(inputs[i], error))
        if i:
            error = (weights[i] @ error) * gelu_slope(sums[i - 1])
    return found


def scan(query, key, value, alpha, theta, eta, first, *, chunk_size, update="token", residual=False, ids=None):
    """Outputs, and W and S after the last token of every row and head; `first` is a list of `[K, in, out]`."""
    batch, length, heads, _ = query.shape
    memories = key.shape[2]
    shape = np.broadcast_shapes(key.shape[:3])
    alpha, theta, eta = (np.broadcast_to(x, shape) for x in (alpha, theta, eta))
    width = value.shape[-1]
    out = np.zeros((batch, length, heads, width))
    last = [np.zeros((batch, *w.shape)) for w in first]
    momenta = [np.zeros((batch, *w.shape)) for w in first]
    for row in range(batch):
        for head in range(memories):
            start = [np.asarray(w[head], float) for w in first]
            weights, momentum, border, count, run = start, [0 * w for w in start], start, 0, None
            collected, gates = [0 * w for w in start], np.zeros(2)
            for t in range(length):
                own = 0 if ids is None else ids[row, t]
                if own < 0:
                    continue
                if run is not None and own != run:
                    weights, momentum, border, count = start, [0 * w for w in start], start, 0
                    collected, gates = [0 * w for w in start], np.zeros(2)
                run = own
                a, th, et = (x[row, t, head] for x in (alpha, theta, eta))
                found = gradients(border, key[row, t, head], value[row, t, head], residual)
                count += 1
                if update == "token":
                    momentum = [et * s - th * g for s, g in zip(momentum, found, strict=True)]
                    weights = [(1 - a) * w + s for w, s in zip(weights, momentum, strict=True)]
                else:
                    collected = [c + th * g for c, g in zip(collected, found, strict=True)]
                    gates = gates + (a, et)
                    if count % chunk_size == 0:
                        a, et = gates / chunk_size
                        momentum = [et * s - c for s, c in zip(momentum, collected, strict=True)]
                        weights = [(1 - a) * w + s for w, s in zip(weights, momentum, strict=True)]
                        collected, gates = [0 * w for w in start], np.zeros(2)
                if count % chunk_size == 0:
                    border = weights
                for n in range(heads):
                    if n // (heads // memories) == head:
                        out[row, t, n] = answer(weights, query[row, t, n], residual)
            for i, (w, s) in enumerate(zip(weights, momentum, strict=True)):
                last[i][row, head], momenta[i][row, head] = w, s
    return out, last, momenta


def inputs(seed=0, *, batch=2, length=11, heads=2, memories=2, width=3, v_dim=None, unit=True):
    """Query, key, value, alpha, theta, eta in float64."""
    random = np.random.default_rng(seed)
    query = random.normal(size=(batch, length, heads, width))
    key = random.normal(size=(batch, length, memories, width))
    if unit:
        key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    value = random.normal(size=(batch, length, memories, width if v_dim is None else v_dim))
    gates = random.uniform(size=(3, batch, length, memories))
    return query, key, value, 0.3 * gates[0], 0.4 * gates[1], gates[2]
