"""Every transformation that Optax exports: a window of micro-steps is one update on the mean, to the bit.

Gradients are small integers and the weights' sum a power of two, so that the means are exact in any order;
outside jit both sides then run the same operations. A transformation that Optax adds fails the first test
here until it is classified. (One file: the table is most of it.)
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_trees_close, assert_trees_equal
from optax import contrib

import optaccum

MASK = {"w": True, "b": False}
LABELS = {"w": "slow", "b": "fast"}
LINE_SEARCH = ("value", "grad", "value_fn")


def measured():
    """`measure_with_ema` gives a measurement for updates; its state is what counts."""
    inner = optax.measure_with_ema(optax.tree.norm, 0.9)
    return optax.GradientTransformation(inner.init, lambda u, s, p=None: (u, inner.update(u, s, p)[1]))


def all_matrices(updates):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), updates)


def not_third(step):
    return step % 3 != 2


WITHOUT_ARGUMENTS = """
    centralize identity keep_params_nonnegative normalize_by_update_norm scale_by_adadelta scale_by_adam
    scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief scale_by_distance_over_gradients
    scale_by_lbfgs scale_by_lion scale_by_novograd scale_by_optimistic_gradient scale_by_param_block_norm
    scale_by_param_block_rms scale_by_rms scale_by_rss scale_by_sign scale_by_sm3 scale_by_stddev
    scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans contrib.cocob contrib.dadapt_adamw
    contrib.normalize contrib.prodigy contrib.scale_by_acprop contrib.scale_by_ademamix
    contrib.scale_by_adopt contrib.scale_by_cocob contrib.scale_by_simplified_ademamix
"""
OF_ONE_NUMBER = """
    adabelief adadelta adagrad adam adamax adamaxw adamw adan adaptive_grad_clip add_decayed_weights amsgrad
    clip clip_by_block_rms clip_by_global_norm ema fromage lamb lars lion nadam nadamw novograd
    optimistic_adam optimistic_adam_v2 optimistic_gradient_descent radam rprop scale scale_by_learning_rate
    scale_by_radam scale_by_rprop sgd sign_sgd signum sm3 trace yogi contrib.acprop contrib.ademamix
    contrib.adopt contrib.dog contrib.dowg contrib.madgrad contrib.muon contrib.scale_by_madgrad
    contrib.schedule_free_adamw contrib.schedule_free_sgd contrib.simplified_ademamix
"""
WITH_ARGUMENTS = {
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "add_noise": lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "apply_every": lambda: optax.apply_every(2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.adam(0.1), not_third),
    "conditionally_transform": lambda: optax.conditionally_transform(optax.adam(0.1), not_third),
    "contrib.galore": lambda: contrib.galore(0.1, rank=1, update_proj_gap=2),
    "contrib.mechanize": lambda: contrib.mechanize(optax.adam(0.1)),
    "contrib.sam": lambda: contrib.sam(optax.adam(0.1), optax.sgd(0.1), sync_period=2),
    "contrib.scale_by_galore": lambda: contrib.scale_by_galore(rank=1),
    "contrib.scale_by_muon": lambda: optax.masked(contrib.scale_by_muon(weight_dimension_numbers=all_matrices), MASK),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(0.1), 0.1),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "freeze": lambda: optax.freeze(MASK),
    "masked": lambda: optax.masked(optax.adam(0.1), MASK),
    "measure_with_ema": measured,
    "multi_transform": lambda: optax.multi_transform({"slow": optax.sgd(1), "fast": optax.adam(1)}, LABELS),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(0.1))),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "partition": lambda: optax.partition({"slow": optax.sgd(1), "fast": optax.adam(1)}, LABELS),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9, centered=True),
    "scale_by_factored_rms": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "scale_by_schedule": lambda: optax.scale_by_schedule(lambda step: 1.0 / (2 + step)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=MASK),
    "snapshot": lambda: optax.snapshot("norm", optax.tree.norm),
    "stateless": lambda: optax.stateless(lambda u, p: jax.tree.map(lambda u, p: u * p, u, p)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda u, p: u - p),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.adam(0.1)),
    # Composed, and not exported under a name of its own.
    "MultiSteps inside": lambda: optax.MultiSteps(optax.sgd(0.1, 0.9), 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(lambda step: 0.1 / (1 + step)),
    "accumulate inside": lambda: optaccum.accumulate(optax.adam(0.1), 2),
    # Given the extra args of `MORE`.
    "contrib.hutchinson_estimator_diag_hessian": contrib.hutchinson_estimator_diag_hessian,
    "contrib.momo": lambda: contrib.momo(0.5),
    "contrib.momo_adam": lambda: contrib.momo_adam(0.5),
    "contrib.reduce_on_plateau": lambda: contrib.reduce_on_plateau(patience=1, rtol=0.0, atol=1e3),
    "contrib.sophia": lambda: contrib.sophia(0.1, update_interval=1),
    "lbfgs": optax.lbfgs,
    "opaque sam": lambda: contrib.sam(optax.adam(0.1), optax.sgd(0.1), opaque_mode=True),
    "polyak_sgd": lambda: optax.polyak_sgd(1.0),
    "scale_by_backtracking_linesearch": lambda: optax.chain(
        optax.scale(-1.0), optax.scale_by_backtracking_linesearch(5)
    ),
    "scale_by_polyak": lambda: optax.scale_by_polyak(max_learning_rate=1.0),
    "scale_by_zoom_linesearch": lambda: optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(5)),
}
MORE = {
    "contrib.hutchinson_estimator_diag_hessian": ("obj_fn",),
    "contrib.momo": ("value",),
    "contrib.momo_adam": ("value",),
    "contrib.reduce_on_plateau": ("value",),
    "contrib.sophia": ("obj_fn",),
    "lbfgs": LINE_SEARCH,
    "opaque sam": ("grad_fn",),
    "polyak_sgd": ("value",),
    "scale_by_backtracking_linesearch": LINE_SEARCH,
    "scale_by_polyak": ("value",),
    "scale_by_zoom_linesearch": LINE_SEARCH,
}
AVERAGED = [name for name, given in MORE.items() if given == ("value",)]
NARROW = {
    "apply_if_finite": "its cond's branches: a state of the gradient's dtype, and one of the parameters'",
    "conditionally_mask": "likewise",
    "conditionally_transform": "likewise",
    "contrib.galore": "it scatters what it makes of the gradient into the parameters' dtype",
    "contrib.scale_by_galore": "likewise",
    "contrib.mechanize": "clamps a number of the gradient's dtype by two of the parameters'",
    "lbfgs": "scatters gradients into a memory of the parameters' dtype",
    "novograd": "its cond's branches: norms of the state's dtype, and of the gradient's",
    "scale_by_lbfgs": "scatters gradients into a memory of the parameters' dtype",
    "scale_by_novograd": "its cond's branches: norms of the state's dtype, and of the gradient's",
}
"""Those in which Optax refuses gradients wider than the parameters: for bf16, `accumulator_dtype=None`."""
# With control flow of their own, which JAX would compile anew at every call.
COMPILED = {*NARROW, *MORE, "MultiSteps inside", "contrib.muon", "contrib.scale_by_muon"}
NOT_EQUAL = {
    "contrib.differentially_private_aggregate": "takes gradients per example: refused by their shape",
    "contrib.dpsgd": "likewise; clip and average per micro-batch, accumulate what comes of it",
    "inject_stateful_hyperparams": "the deprecated name of inject_hyperparams, which makes transformations",
    "lookahead": "its gradients are shaped as half of its parameters: it goes around the window",
    "monitor": "its first update changes its state's structure: refused; it goes around the window",
}
NOT_TRANSFORMATIONS = """
    bias_correction matrix_inverse_pth_root sigmoid_binary_cross_entropy sigmoid_focal_loss
    update_infinity_moment update_moment update_moment_per_elem_norm unitwise_clip unitwise_norm
    contrib.schedule_free_eval_params
"""


def factory_of(name):
    if name in WITH_ARGUMENTS:
        return WITH_ARGUMENTS[name]
    fn = getattr(contrib, name.removeprefix("contrib.")) if "." in name else getattr(optax, name)
    return functools.partial(fn, 0.1) if name in OF_ONE_NUMBER.split() else fn


CASES = sorted({*WITHOUT_ARGUMENTS.split(), *OF_ONE_NUMBER.split(), *WITH_ARGUMENTS})


def exported():
    """Functions that say they return a transformation, or do not say what they return."""
    for module, prefix in ((optax, ""), (optax.transforms, ""), (contrib, "contrib.")):
        for name, fn in vars(module).items():
            if name.startswith("_") or not inspect.isroutine(inspect.unwrap(fn) if callable(fn) else fn):
                continue
            returns = inspect.signature(fn).return_annotation
            named = "" if returns is inspect.Signature.empty else getattr(returns, "__name__", str(returns))
            if not named or ("GradientTransformation" in named and "Callable" not in named):
                yield prefix + name


def test_every_export_of_optax_is_classified():
    names = set(exported())
    classified = {*CASES, *NOT_EQUAL, *NOT_TRANSFORMATIONS.split()}
    assert not names - classified, "classify these: what they need, or why they cannot be equal"
    assert names - (classified - {"adamw", "contrib.dog"}) == {"adamw", "contrib.dog"}  # typed, and untyped
    assert set(MORE) <= set(CASES)


# Two windows of two micro-batches, of three examples and one.


def parameters(is_complex, dtype):
    params = {"w": jnp.array([[1, 2, 3], [3, 1, 2], [1, 1, 4]], dtype), "b": jnp.array([1, 0.5, 2], dtype)}
    return params | ({"c": jnp.array([1 + 2j, 2 - 1j])} if is_complex else {})


@functools.cache
def examples(is_complex, dtype, window):
    """Each example's gradient, stacked; the first three average to integers."""
    rng = np.random.default_rng(window)

    def stack(leaf):
        first, other, step = (rng.integers(-4, 5, leaf.shape) for _ in range(3))
        stacked = np.stack([first + step, first, first - step, other])
        return jnp.asarray(stacked * (1 - 2j) if jnp.iscomplexobj(leaf) else stacked, leaf.dtype)

    return jax.tree.map(stack, parameters(is_complex, dtype))


def mean_of(rows, dtype):
    """In float64, rounded once."""

    def mean(x):
        x = np.asarray(x)
        wide = x if np.iscomplexobj(x) else x.astype(np.float64)
        return jnp.asarray(wide.mean(0), x.dtype if np.iscomplexobj(x) else dtype)

    return jax.tree.map(mean, rows)


def objective(gradient, at, params):
    """A parabola with this gradient at `at`."""
    gradient, at, params = (optax.tree.cast(tree, jnp.float32) for tree in (gradient, at, params))
    steps = optax.tree.sub(params, at)
    curvature = 1 + optax.tree.norm(gradient, squared=True) / 64
    return optax.tree.vdot(gradient, steps) + curvature * optax.tree.norm(steps, squared=True) / 2


def objective_gradient(gradient, at, params, _):
    return jax.grad(objective, argnums=2)(gradient, at, params)


def extra_args(name, rows, params, dtype):
    """What the transformation is to know of these examples."""
    gradient = mean_of(rows, dtype) if name in MORE else ()
    objective_fn = jax.tree_util.Partial(objective, gradient, params)
    given = {
        "value": 20 + jnp.sum(gradient["b"]) if name in AVERAGED else jnp.float32(0),
        "grad": gradient,
        "value_fn": objective_fn,
        "obj_fn": objective_fn,
        "grad_fn": jax.tree_util.Partial(objective_gradient, gradient, params),
    }
    return {key: given[key] for key in MORE.get(name, ())}


def micro_steps(name, rows, params, extra, *, sizes=(3, 1), summed=False):
    """Each micro-batch's gradient, of its mean or summed loss, and the rest of what `update` takes."""
    for part, size in zip((slice(0, 3), slice(3, 4)), sizes, strict=True):
        part = jax.tree.map(lambda x, part=part: x[part], rows)
        scale = size if summed else 1
        grads = jax.tree.map(lambda x, scale=scale: jnp.asarray(x.mean(0) * scale, x.dtype), part)
        if name in AVERAGED:
            extra = {"value": scale * extra_args(name, part, params, jnp.float32)["value"]}
        yield grads, extra | {"denominator" if summed else "weight": size}


@functools.cache  # compiled once for all
def scanned_gradients(is_complex, dtype, window, sum_dtype):
    """Of all examples, in micro-batches of two, one and one; and their weight."""

    def loss_fn(params, rows):
        products = jax.tree.map(lambda x, p: jnp.sum(jnp.real(x * p).astype(jnp.float32)), rows, params)
        return sum(jax.tree.leaves(products)) / rows["b"].shape[0]

    grad_fn = optaccum.grad(loss_fn, num_microbatches=3, return_info=True, accumulator_dtype=sum_dtype)
    grads, info = grad_fn(parameters(is_complex, dtype), examples(is_complex, dtype, window))
    return grads, info.weight


def run_window(tx, state, params, calls):
    for grads, given in calls:
        updates, state = tx.update(grads, state, params, **given)
    return updates, state.inner_state


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_window_is_one_update_on_the_mean(name, dtype):
    is_complex = name == "contrib.split_real_and_imaginary"
    sum_dtype = None if dtype == "bfloat16" and name in NARROW else jnp.float32
    mean_dtype = sum_dtype or dtype
    inner = optax.with_extra_args_support(factory_of(name)())
    if name in COMPILED:
        inner = inner._replace(update=jax.jit(inner.update))
    tx, tx_1 = (
        optaccum.accumulate(inner, k, averaged_extra_args=("value",) * (name in AVERAGED), accumulator_dtype=sum_dtype)
        for k in (2, 1)
    )

    def updated_once(rows, state, params, extra):
        """The inner optimizer alone: its state keeps its dtypes."""
        updates, new = inner.update(mean_of(rows, mean_dtype), state, params, **extra)
        return updates, jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new, state)

    def rounded(updates, rows, state, params, extra):
        """To the dtypes that the inner optimizer gives for gradients of the parameters' dtypes."""
        update = functools.partial(inner.update, **extra)
        like, _ = jax.eval_shape(update, mean_of(rows, dtype), state, params)
        return jax.tree.map(lambda u, like: jnp.asarray(u, like.dtype), updates, like)

    params = parameters(is_complex, dtype)
    state = tx.init(params)
    rows = examples(is_complex, dtype, 0)
    extra = extra_args(name, rows, params, mean_dtype)
    updates, inner_state = updated_once(rows, inner.init(params), params, extra)
    updates = rounded(updates, rows, inner_state, params, extra)
    streamed = run_window(tx, state, params, micro_steps(name, rows, params, extra))
    assert_trees_equal(streamed, (updates, inner_state))
    if dtype == "float32" and name != "set_to_zero":  # the mean of means, and what the last micro-batch knows
        last = extra_args(name, jax.tree.map(lambda x: x[3:], rows), params, mean_dtype)
        wrong = run_window(tx, state, params, micro_steps(name, rows, params, last, sizes=(1, 1)))
        with pytest.raises(AssertionError):
            assert_trees_close(wrong, streamed, rtol=1e-4)

    params = optax.apply_updates(params, updates)
    state = state._replace(inner_state=inner_state)
    rows = examples(is_complex, dtype, 1)
    extra = extra_args(name, rows, params, mean_dtype)
    updates, inner_state = updated_once(rows, state.inner_state, params, extra)
    applied = params, state
    for grads, given in micro_steps(name, rows, params, extra, summed=True):
        applied = optaccum.apply_gradients(tx, grads, applied[1], applied[0], **given)
    expected = optax.apply_updates(params, rounded(updates, rows, state.inner_state, params, extra))
    assert_trees_equal((applied[0], applied[1].inner_state), (expected, inner_state))

    grads, weight = scanned_gradients(is_complex, dtype, 1, sum_dtype)
    scanned = run_window(tx_1, state, params, [(grads, extra | {"weight": weight})])
    assert_trees_equal(scanned, (updates, inner_state))


@pytest.mark.parametrize("name", sorted(NARROW))
def test_a_gradient_wider_than_the_parameters_is_refused_by_optax_itself(name):
    params, inner = parameters(False, "bfloat16"), optax.with_extra_args_support(factory_of(name)())
    extra = extra_args(name, examples(False, "bfloat16", 0), params, jnp.float32)
    for transformation in (inner, optaccum.accumulate(inner, 1)):
        for grads, refused in ((params, False), (optax.tree.cast(params, jnp.float32), True)):
            update = functools.partial(transformation.update, **extra)
            refused |= transformation is not inner  # whose means are float32
            error = None
            try:
                jax.eval_shape(update, grads, transformation.init(params), params)
            except (TypeError, FutureWarning) as raised:
                error = raised
            assert (error is not None) == refused
