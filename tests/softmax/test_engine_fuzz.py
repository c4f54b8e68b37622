"""Random combinations of everything the engine takes: a dense truth, the reference and the blockwise implementation.

A case is drawn from its number. Values and lse of both implementations are compared with a dense float64 truth in
numpy, all gradients of one implementation with those of the other. Then NaN and inf are put where nobody may look, and
nothing may change.

More cases than the suite runs: `FUZZ=100:400 pytest tests/softmax/test_engine_fuzz.py`.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks, normalizers
from jattn.softmax.blockwise import loops
from jattn.softmax.compilers import from_block_mask
from jattn.softmax.dropout import keep_pairs
from jattn.testing.compiling import quick_jit
from tests.grids import mostly_slow

CASES = range(*map(int, os.environ.get("FUZZ", "0:24").split(":")))
# Together they take every argument and every kind of operand that a case may have.
FAST = (3, 4, 5, 7, 8, 14, 17)


def shift_heads(b, h, i, j, aux):
    return j <= i + h


def look_up(b, h, i, j, aux):
    return aux[h, (i + j) % aux.shape[1]]


def affine(logit, b, h, i, j, factor, term):
    return logit * factor + term * jnp.cos(1.0 * (i - j))


def bend(logit, b, h, i, j, table):
    return logit + jnp.tanh(logit) * table


NORMALIZERS = (
    normalizers.sigmoid(),
    normalizers.sigmoid(True),
    normalizers.elu1(True),
    normalizers.relu_over_n(),
    normalizers.softplus_l1(),
    normalizers.taylor2(1e-3),
    normalizers.reweighted(normalizers.softplus_l1(), 3),
    normalizers.reweighted(normalizers.softmax(), 2),
)


class Case:
    """Arrays with gradients, the call, and the dense facts that the truth needs."""

    def __init__(self, number):
        self.rng = rng = np.random.default_rng(number)
        self.batch, self.kv_heads = (int(rng.integers(1, 3)) for _ in range(2))
        self.group = int(rng.choice([1, 2, 3]))
        self.heads = self.kv_heads * self.group
        self.length, self.source = (int(rng.integers(1, 24)) for _ in range(2))
        if self.chance():
            self.source = self.length
        dim, width = (int(rng.integers(1, 6)) for _ in range(2))
        self.arrays = {
            "query": rng.normal(size=(self.batch, self.length, self.heads, dim)) * 2,
            "key": rng.normal(size=(self.batch, self.source, self.kv_heads, dim)),
            "value": rng.normal(size=(self.batch, self.source, self.kv_heads, width)),
        }
        self.fixed, self.static, self.shape = {}, {}, (self.batch, self.heads, self.length, self.source)
        self.visible = np.ones(self.shape, bool)
        self.place = self.positions()
        self.masks()
        if self.chance(0.35):
            self.make_layout()
        self.additions()
        blocks = tuple(int(x) for x in rng.choice([1, 3, 4, 7, 8, 16], 2))
        self.static["block_sizes"] = blocks if self.chance(0.8) else None

    def chance(self, share=0.5):
        return bool(self.rng.random() < share)

    def axes(self, sizes, share=0.5):
        """A random shape that broadcasts to `sizes`."""
        return tuple(n if self.chance(share) else 1 for n in sizes)

    def positions(self):
        place = []
        for name, n in (("query_positions", self.length), ("key_positions", self.source)):
            given = np.arange(n)[None]
            if self.chance(0.3):
                rows = self.batch if self.chance() else 1
                start = self.rng.integers(0, 9, (rows, 1))
                given = start + (self.rng.permuted(np.tile(given, (rows, 1)), axis=1) if self.chance() else given)
                self.fixed[name] = given
            place.append(given)
        return place[0][:, None, :, None], place[1][:, None, None, :]

    def masks(self):
        rng, (i, j) = self.rng, self.place
        lead = (np.arange(self.batch)[:, None, None, None], np.arange(self.heads)[None, :, None, None])
        low = rng.integers(0, 9, self.batch)
        table = rng.random((self.heads, 7)) < 0.6
        big = rng.random(self.axes((self.batch, self.heads)) + (1 if self.chance() else 40, 40)) < 0.7
        options = [
            (masks.causal(), j <= i),
            (masks.sliding_window(4, 1), (j <= i) & ((i - j < 4) | (j < 1))),
            (masks.local_window(None, 2), j <= i + 2),
            (masks.prefix(3), j < 3),
            (masks.prefix(low), j < low[:, None, None, None]),
            (masks.mask_mod(shift_heads), j <= i + lead[1]),
            (masks.mask_mod(look_up, table), table[lead[1], (i + j) % 7]),
            (masks.dense(big), np.broadcast_to(big, (self.batch, self.heads, 40, 40))[*lead, i, j]),
        ]
        if self.chance(0.6):
            (one, seen), (two, also) = (options[n] for n in rng.integers(len(options), size=2))
            if self.chance(0.3):
                one, seen = ~one, ~seen
            mask, seen = [(one, seen), (one & two, seen & also), (one | two, seen | also)][rng.integers(3)]
            self.fixed["mask"] = mask
            self.visible = self.visible & seen
        elif self.chance():
            self.fixed["mask"] = rng.random(self.axes(self.shape)) < rng.choice([0.1, 0.6])
            self.visible = self.visible & self.fixed["mask"]
        if self.chance(0.3):
            self.static["is_causal"] = True
            self.visible = self.visible & (j <= i)
        if self.chance(0.15):
            self.static["local_window_size"] = (5, 3)
            self.visible = self.visible & (j >= i - 5) & (j <= i + 3)
        if self.chance(0.3):
            ids = [np.sort(rng.integers(-1, 3, (self.batch if self.chance() else 1, n))) for n in self.shape[2:]]
            self.fixed["segment_ids"] = tuple(ids)
            same = ids[0][:, None, :, None] == ids[1][:, None, None, :]
            self.visible = self.visible & same & (ids[0] >= 0)[:, None, :, None]
        for name, axis in (("query_seq_lengths", 2), ("key_value_seq_lengths", 3)):
            if self.chance(0.15):
                limit = rng.integers(0, self.shape[axis] + 1, self.batch)
                self.fixed[name] = limit
                index = np.arange(self.shape[axis]).reshape((-1, 1) if axis == 2 else (1, -1))
                self.visible = self.visible & (index < limit[:, None, None, None])

    def make_layout(self):
        rng = self.rng
        slots, perms = [], []
        for n in self.shape[2:]:
            perm, size = None, n
            if self.chance(0.4):
                size = n + int(rng.integers(0, 6))
                rows, heads = self.axes((self.batch, self.kv_heads if self.chance() else self.heads))
                perm = np.full((rows, heads, size), -1, np.int32)
                for row in perm.reshape(-1, size):
                    row[rng.permutation(size)[:n]] = rng.permutation(n)
            slots.append(size)
            perms.append(perm)
        blocks = [int(n) for n in rng.choice([2, 4, 8], 2)]
        tiles = [-(-size // block) for size, block in zip(slots, blocks, strict=True)]
        lead = self.axes((self.batch, self.kv_heads if self.chance() else self.heads))
        predicate = [None, masks.sliding_window(7), masks.mask_mod(shift_heads)][rng.integers(3)]
        layout = from_block_mask(
            rng.random((*lead, *tiles)) < 0.7,
            predicate,
            full=None if predicate is None else rng.random((*lead, *tiles)) < 0.3,
            query_slots=slots[0],
            key_slots=slots[1],
            query_block=blocks[0],
            key_block=blocks[1],
            query_perm=perms[0],
            key_perm=perms[1],
        )
        self.fixed["layout"] = layout
        given = {n: x for n, x in self.fixed.items() if n.endswith("positions")}
        self.visible = self.visible & np.asarray(layout.to_dense(*self.shape, **given))

    def additions(self):
        rng = self.rng
        self.has_bias = self.chance()
        if self.has_bias:
            bias = rng.normal(size=self.axes(self.shape)[rng.integers(0, 3) :])
            self.arrays["bias"] = np.where(rng.random(bias.shape) < 0.1, -np.inf, bias) if self.chance(0.3) else bias
        self.mods = int(rng.choice([0, 0, 1, 2, 3]))
        lead = [(), (self.heads,), (1, self.heads), (self.batch, 1), (self.batch, self.heads)]
        tails = {"query": (self.length,), "key": (self.source,), "pair": self.shape[2:], "offset": (9,), "scalar": ()}

        def operand(kind):
            leads = lead[1:] if kind == "head" else lead
            shape = leads[rng.integers(len(leads))] + tails.get(kind, ())
            return rng.normal(size=shape)

        kinds = list(tails) + ["head"]
        self.kinds = {n: str(rng.choice(kinds)) for n in ("factor", "term")}
        self.kinds["table"] = "offset"
        if self.mods & 1:
            self.arrays.update({n: operand(self.kinds[n]) for n in ("factor", "term")})
        if self.mods & 2:
            self.arrays["table"] = operand("offset")
        self.center = int(rng.integers(0, 9)) if self.chance() else None
        if self.chance(0.25):
            self.static["logit_soft_cap"] = 1.5
        if self.chance(0.3):
            self.arrays["sinks"] = rng.normal(size=self.heads)
        elif self.chance(0.35):
            self.static["normalizer"] = NORMALIZERS[rng.integers(len(NORMALIZERS))]
        if self.chance(0.25):
            self.static["dropout_rate"] = 0.4
        if self.chance(0.2):
            self.static["scale"] = 0.3

    def score_mod(self, arrays):
        found = []
        if self.mods & 1:
            names = ("factor", "term")
            operands = {n: jattn.Operand(arrays[n], self.kinds[n]) for n in names}
            found.append(jattn.ScoreMod(affine, operands))
        if self.mods & 2:
            found.append(jattn.ScoreMod(bend, {"table": jattn.Operand(arrays["table"], "offset", self.center)}))
        return None if not found else found[0] if len(found) == 1 else found[0] >> found[1]

    def call(self, implementation, arrays, fixed):
        own = {n: x for n, x in arrays.items() if n in ("query", "key", "value", "bias", "sinks")}
        static = dict(self.static)
        if "dropout_rate" in static:
            static["dropout_key"] = jax.random.key(5)
        return jattn.dot_product_attention(
            **own,
            **fixed,
            **static,
            score_mod=self.score_mod(arrays),
            implementation=implementation,
            return_residual=True,
        )

    def compiled(self, implementation):
        """(arrays, fixed) -> (gradients, (out, lse))."""

        def loss(arrays, fixed):
            out, lse = self.call(implementation, arrays, fixed)
            weigh = jnp.sin(jnp.arange(out.size) + 1.0).reshape(out.shape)
            return (out * weigh).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum(), (out, lse)

        traced = {n: x for n, x in self.fixed.items() if self.traced}
        known = {n: x for n, x in self.fixed.items() if not self.traced}
        run = quick_jit(lambda arrays, traced: jax.grad(loss, has_aux=True)(arrays, {**traced, **known}))
        return lambda arrays: jax.tree.map(np.asarray, run(arrays, traced))

    def spread(self, name, kind):
        """An operand at full size."""
        x = self.arrays[name]
        if kind == "offset":
            center = 4 if self.center is None or name != "table" else self.center
            x = np.broadcast_to(x, (self.batch, self.heads, 9))
            index = np.clip(self.place[1] - self.place[0] + center, 0, 8)
            rows = [np.arange(n).reshape(s) for n, s in ((self.batch, (-1, 1, 1, 1)), (self.heads, (1, -1, 1, 1)))]
            return x[rows[0], rows[1], index]
        tails = {"query": (self.length, 1), "key": (1, self.source), "pair": self.shape[2:]}
        rank = {"query": 1, "key": 1, "pair": 2}.get(kind, 0)
        lead = x.shape[: x.ndim - rank]
        return x.reshape((1,) * (2 - len(lead)) + lead + tails.get(kind, (1, 1)))

    def truth(self):
        """Output and lse, dense."""
        query, key, value = (self.arrays[n] for n in ("query", "key", "value"))
        key, value = (np.repeat(x, self.group, axis=2) for x in (key, value))
        s = np.einsum("btnd,bsnd->bnts", query, key) * self.static.get("scale", query.shape[-1] ** -0.5)
        cap = self.static.get("logit_soft_cap")
        s = s if cap is None else cap * np.tanh(s / cap)
        i, j = self.place
        if self.mods & 1:
            factor, term = (self.spread(name, self.kinds[name]) for name in ("factor", "term"))
            s = s * factor + term * np.cos(i - j)
        if self.mods & 2:
            s = s + np.tanh(s) * self.spread("table", "offset")
        s = s + self.arrays.get("bias", 0.0)
        seen = np.where(self.visible, s, -np.inf)
        with np.errstate(divide="ignore"):
            lse = np.log(np.exp(seen).sum(-1))
        normalizer = self.static.get("normalizer")
        if normalizer is None:
            sinks = np.exp(self.arrays["sinks"])[None, :, None] if "sinks" in self.arrays else 0.0
            total = np.exp(lse) + sinks
            weights = np.exp(seen) / np.where(total == 0, 1, total)[..., None]
        else:
            weights = np.asarray(normalizer.weights(s, self.visible, self.visible.sum(-1, keepdims=True)))
        if "dropout_rate" in self.static:
            seed = jax.random.bits(jax.random.key(5), (2,), jnp.uint32)
            index = np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij")
            weights = weights * np.asarray(keep_pairs(seed, 0.4, *index)) / 0.6
        return np.einsum("bnts,bsnd->btnd", weights, value), np.swapaxes(lse, 1, 2)

    def poisoned(self, poison):
        """The arrays with `poison` where nobody may look: keys, values, bias, and queries that see nothing."""
        arrays = dict(self.arrays)
        grouped = self.visible.reshape(self.batch, self.kv_heads, self.group, *self.shape[2:])
        unseen = ~np.swapaxes(grouped.any((2, 3)), 1, 2)[..., None]
        arrays.update({n: np.where(unseen, poison, arrays[n]) for n in ("key", "value")})
        arrays["query"] = np.where(~np.swapaxes(self.visible.any(3), 1, 2)[..., None], poison, arrays["query"])
        if "bias" in arrays:
            bias = arrays["bias"]
            shape = (1,) * (4 - bias.ndim) + bias.shape
            hidden = ~self.visible.any(tuple(n for n in range(4) if shape[n] == 1), keepdims=True)
            arrays["bias"] = np.where(hidden.reshape(bias.shape), poison, bias)
        return arrays


@pytest.fixture(autouse=True)
def _wide(x64):
    pass


@pytest.mark.parametrize("number", mostly_slow(CASES, [number for number in CASES if number in FAST]))
def test_a_random_call(number, monkeypatch):
    case = Case(number)
    case.traced = number % 2 == 0
    if number % 3 == 2:  # as on several devices: all heads at once
        monkeypatch.setattr(loops, "one_head_at_a_time", lambda: False)
    truth = case.truth()
    runs = {n: case.compiled(n) for n in ("reference", "blockwise")}
    found = {n: run(case.arrays) for n, run in runs.items()}
    for name, (_, (out, lse)) in found.items():
        np.testing.assert_allclose(lse, truth[1], rtol=1e-10, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(out, truth[0], rtol=1e-9, atol=1e-10, err_msg=name)
        assert not out[truth[1] == -np.inf].any(), name
    compare(found["blockwise"][0], found["reference"][0], "blockwise, reference")
    arrays = case.poisoned([np.nan, np.inf, -np.inf][number % 3])
    for name, run in runs.items():
        gradients, (out, lse) = run(arrays)
        results = {"out": out, "lse": lse, **gradients}
        expected = {"out": found[name][1][0], "lse": found[name][1][1], **found[name][0]}
        compare(results, expected, f"poisoned {name}")


def compare(actual, expected, what):
    for name, x in actual.items():
        assert np.isfinite(x).all() or name == "lse", f"{what}: {name} is not finite"
        scale = np.abs(np.where(np.isfinite(expected[name]), expected[name], 0)).max(initial=1)
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-9 * scale, err_msg=f"{what}: {name}")
