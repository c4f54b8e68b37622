"""A recurrence as loops in float64 numpy, and inputs of every kind for it."""

import numpy as np

KINDS = ("none", "head", "token", "channel")


def rng(seed=0):
    return np.random.default_rng(seed)


def inputs(kind="channel", *, rank1=False, seed=0, batch=2, length=23, heads=2, width=5, v_dim=4, strong=False):
    """Arguments of `linear_recurrence` in float64; `strong` puts gates of -1e4, -3e4 and -50 among mild ones."""
    r = rng(seed)
    shape = (batch, length, heads, width)
    made = {
        "query": r.normal(size=shape),
        "key": r.normal(size=shape),
        "value": r.normal(size=(batch, length, heads, v_dim)),
    }
    shapes = {"head": (heads,), "token": shape[:3], "channel": shape}
    if kind != "none":
        gates = -np.abs(r.normal(size=shapes[kind])) * 0.3
        if strong and kind != "head":
            gates[:, length // 3] = -1e4
            gates[:, length // 2] = -3e4
            gates[:, length // 2 + 2] = -50
            gates[:, length // 4, :1] = 0.0
        made["log_decay"] = gates
    if rank1:
        unit = made["key"] / np.linalg.norm(made["key"], axis=-1, keepdims=True)
        beta = r.uniform(0.2, 1.2, size=shape[:3])[..., None]
        made["key"], made["a"], made["b"] = beta * unit, -unit, beta * unit
    return made


def truth(
    query,
    key,
    value,
    *,
    log_decay=None,
    a=None,
    b=None,
    scale=None,
    initial_state=None,
    segment_ids=None,
    reverse=False,
    read="post",
    bonus=None,
):
    """Output and final state, token by token, segment by segment."""
    if reverse:
        turned = [None if x is None else np.flip(x, 1) for x in (query, key, value, a, b, segment_ids)]
        gates = log_decay if log_decay is None or log_decay.ndim == 1 else np.flip(log_decay, 1)
        out, state = truth(
            *turned[:3],
            log_decay=gates,
            a=turned[3],
            b=turned[4],
            segment_ids=turned[5],
            scale=scale,
            initial_state=initial_state,
            read=read,
            bonus=bonus,
        )
        return np.flip(out, 1), state
    heads = max(query.shape[2], value.shape[2])

    def spread(x):
        return x if x is None else np.repeat(x, heads // x.shape[2], axis=2)

    query, key, value, a, b = map(spread, (query, key, value, a, b))
    batch, length, _, width = query.shape
    scale = width**-0.5 if scale is None else scale
    out = np.zeros((batch, length, heads, value.shape[-1]))
    final = np.zeros((batch, heads, width, value.shape[-1]))
    for row in range(batch):
        for head in range(heads):
            state = np.zeros(final.shape[2:]) if initial_state is None else initial_state[row, head].astype(float)
            last = None
            for t in range(length):
                if segment_ids is not None:
                    own = segment_ids[row, t]
                    if own < 0:
                        continue
                    if last is not None and own != last:
                        state = np.zeros_like(state)
                    last = own
                gate = np.zeros(width)
                if log_decay is not None:
                    gate = gate + (log_decay[head] if log_decay.ndim == 1 else log_decay[row, t, head])
                before = state
                state = np.exp(gate)[:, None] * before
                if a is not None:
                    state = state + np.outer(b[row, t, head], a[row, t, head] @ before)
                own = np.outer(key[row, t, head], value[row, t, head])
                state = state + own
                if read == "post":
                    seen = state
                else:
                    seen = before + (0 if bonus is None else bonus[head][:, None] * own)
                out[row, t, head] = scale * query[row, t, head] @ seen
            final[row, head] = state
    return out, final
