"""Flax's TrainState, in place."""

import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import optaccum
from optaccum._streaming.state import states_in, with_nested


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` that streams through :func:`optaccum.apply_gradients`.

    For a `tx` that :func:`optaccum.accumulate` made, parameters and optimizer state are touched only by the call that
    ends a window, and then in place where the state is donated (`jax.jit(step, donate_argnums=0)`). Numbers and fields
    are those of Flax's own, for any `tx`: a checkpoint of one restores into the other.

    Attributes:
      step: calls of `apply_gradients` so far; what to log beside a schedule is `gradient_step`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaccum
      >>> from optaccum.linen import TrainState
      >>> tx = optaccum.accumulate(optax.sgd(1.0), 2)
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(2)}, tx=tx)
      >>> for tokens in (1, 3):
      ...     state = state.apply_gradients(grads={"w": jnp.full(2, tokens)}, weight=tokens)
      >>> int(state.step), int(state.gradient_step), state.params["w"].tolist()
      (2, 1, [-2.5, -2.5])
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        weight: jax.typing.ArrayLike | None = None,
        denominator: jax.typing.ArrayLike | None = None,
        emit: jax.typing.ArrayLike | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **replaced: Any,
    ) -> Self:
        """One micro-step.

        Args:
          grads: gradients of one micro-batch, shaped like `params`. Where they hold `OVERWRITE_WITH_GRADIENT` (FP8
            scales and amax histories), that collection is replaced by its gradient at every call, as Flax does.
          weight: scalar; see :func:`optaccum.accumulate`. Handed on only if given, as the next two.
          denominator: scalar; likewise.
          emit: scalar; likewise.
          extra_args: for the optimizer, such as `{"value": loss}`.
          **replaced: other fields to replace, such as `batch_stats`.

        Returns:
          The new state.

        Raises:
          TypeError, ValueError: as :func:`optaccum.apply_gradients`.
        """
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        old, own = (self.params["params"], grads["params"]) if overwrites else (self.params, grads)
        params, opt_state = optaccum.apply_gradients(
            self.tx, own, self.opt_state, old, weight=weight, denominator=denominator, emit=emit, **(extra_args or {})
        )
        if overwrites:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **replaced)

    @property
    def gradient_step(self) -> jax.Array:
        """Updates of all parameters so far, shape=(), int32.

        Of several accumulators in `opt_state` (`optax.partition`, windows of windows) the least; `step` where there is
        none.
        """
        states = with_nested(states_in(self.opt_state))
        steps = [state.gradient_step for state in states] or [jnp.asarray(self.step, jnp.int32)]
        return functools.reduce(jnp.minimum, steps)
