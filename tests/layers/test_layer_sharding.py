def test_heads_and_batch_split_over_devices(run_with_devices):
    code = """
        import re
        import jax, jax.numpy as jnp, numpy as np
        from flax import nnx
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jattn import masks
        from jattn.cache import FullCache
        from jattn.layers import MultiHeadAttention, Rope, named_shardings

        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        layer = MultiHeadAttention(16, 4, num_kv_heads=2, position=Rope(), rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)
        x = jax.random.normal(jax.random.key(1), (4, 6, 16))

        def forward(state, x):
            return nnx.merge(graphdef, state)(x, mask=masks.causal()).output

        policy = FullCache(8)
        def decode(state, x, cache):
            return nnx.merge(graphdef, state)(x, cache=(policy, cache))[:2]

        def collectives(f, *args):
            text = jax.jit(f).lower(*args).compile().as_text()
            return set(re.findall(r"(all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\\(", text))

        expected = forward(state, x)
        cache = layer.init_cache(policy, 4)
        placed = jax.device_put(state, named_shardings(state, mesh))
        rows = NamedSharding(mesh, P("data"))
        sharded_x = jax.device_put(x, rows)
        heads = NamedSharding(mesh, P("data", None, "model"))
        sharded_cache = jax.device_put(
            cache, type(cache)(key=heads, value=heads, key_positions=rows, next=rows, aux=())
        )
        np.testing.assert_allclose(jax.jit(forward)(placed, sharded_x), expected, atol=1e-5)
        out, _ = jax.jit(decode)(placed, sharded_x, sharded_cache)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        # Row-parallel output projection: one sum over heads, and nothing else.
        print(sorted(collectives(forward, placed, sharded_x)), end=" ")
        print(sorted(collectives(decode, placed, sharded_x, sharded_cache)))
    """
    assert run_with_devices(4, code).split("\n")[-2] == "['all-reduce'] ['all-reduce']"
