"""A small problem, its losses with equal and unequal weights, and the formula that is wrong for them."""

import jax
import jax.numpy as jnp
import numpy as np

import optaccum

PARAMS = {"w": jnp.array([0.5, -0.3, 0.2]), "b": jnp.float32(0.1)}
X = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "mask": jnp.array([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])}
SIZES = [3, 2, 2]  # of the micro-batches where 7 examples split in 3


def per_example(params, batch):
    """Losses of the examples; the scan, over one layer, is what lets `in_place` be chosen."""
    h, _ = jax.lax.scan(lambda h, b: (h + b, None), batch["x"] @ params["w"], params["b"][None])
    return jnp.tanh(h) ** 2


def mean_loss(params, batch):
    return jnp.mean(per_example(params, batch))


def token_loss(params, batch):
    return optaccum.WeightedMean((per_example(params, batch) * batch["mask"]).sum(), batch["mask"].sum())


def ratio_loss(params, batch):
    return (per_example(params, batch) * batch["mask"]).sum() / batch["mask"].sum()


def penalty(params, batch):
    return 0.3 * jnp.mean(jnp.abs(batch["x"] @ params["w"]))


def mean_term(mean, batch):
    """A mean over examples as a term of a loss."""
    return optaccum.WeightedMean(mean * len(batch["x"]), len(batch["x"]))


def micro_batches(n, batch=BATCH):
    return [jax.tree.map(lambda x, i=i: x[i::n], batch) for i in range(n)]


def mean_of_means(loss_fn, n, args=(PARAMS,), batch=BATCH):
    """The wrong formula, where weights are unequal."""
    results = [jax.value_and_grad(loss_fn)(*args, micro_batch) for micro_batch in micro_batches(n, batch)]
    return jax.tree.map(lambda *xs: jnp.mean(jnp.stack(xs), 0), *results)


def aux_of(aux_fn, n, loss_fn=mean_loss, batch=BATCH, **options):
    """What `aux_fn` of the batch comes back as, over n micro-batches."""

    def with_aux(params, batch):
        return loss_fn(params, batch), aux_fn(batch)

    grad_fn = optaccum.value_and_grad(with_aux, num_microbatches=n, has_aux=True, **options)
    return grad_fn(PARAMS, batch)[0][1]


LOSSES = {
    "mean": (mean_loss, mean_loss),
    "weighted": (token_loss, ratio_loss),
    "terms": (
        lambda p, b: {"tokens": token_loss(p, b), "penalty": mean_term(penalty(p, b), b)},
        lambda p, b: ratio_loss(p, b) + penalty(p, b),
    ),
}
