"""The options of `value_and_grad`, in one record."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from optaccum._checks import check_flag, check_function
from optaccum._dtypes import AccumulatorDType, check_accumulator_dtype
from optaccum._scanning.call import Roles, make_roles
from optaccum._scanning.data_axes import as_axes
from optaccum._scanning.sharded import check_gather_dtype, check_specs
from optaccum._scanning.split import check_positive_int, check_split_options


class Options(NamedTuple):
    """The options of `value_and_grad`, checked."""

    roles: Roles
    one_argnum: bool
    num_microbatches: int | None
    microbatch_size: int | None
    has_aux: bool
    accumulator_dtype: AccumulatorDType
    skip_nonfinite: bool
    presplit: bool
    data_axes: tuple[str, ...]
    param_specs: Any
    gather_dtype: Any
    grad_specs: Any
    shard_sums: bool
    in_place: bool | None
    grad_reduction_fn: Callable[[tuple[Any, ...], Any], str] | None
    return_info: bool
    track_noise_scale: bool
    unroll: int


def make_options(given: dict[str, Any]) -> Options:
    """The arguments of `value_and_grad`, checked.

    Raises:
      ValueError, TypeError: for one that is not what it says, or that rules out another.
    """
    given = dict(given)
    check_function(given.pop("loss_fn"), "loss_fn")
    for name in ("has_aux", "skip_nonfinite", "presplit", "shard_sums", "return_info", "track_noise_scale"):
        given[name] = check_flag(given[name], name)
    given["in_place"] = check_flag(given["in_place"], "in_place", or_none=True)
    names = ("argnums", "batch_argnums", "key_argnum", "carry_argnum", "count_argnum")
    argnums = {name: given.pop(name) for name in names}
    if given["grad_reduction_fn"] is not None:
        check_function(given["grad_reduction_fn"], "grad_reduction_fn")
    if not isinstance(given["unroll"], bool):
        check_positive_int(given["unroll"], "unroll")
    sizes = check_split_options(given["num_microbatches"], given["microbatch_size"], given["presplit"])
    check_accumulator_dtype(given["accumulator_dtype"])
    for name in ("param_specs", "grad_specs"):
        check_specs(given[name], name)
    check_gather_dtype(given["gather_dtype"])
    options = Options(
        roles=make_roles(**argnums),
        one_argnum=not isinstance(argnums["argnums"], Iterable),
        **given | {"num_microbatches": sizes[0], "microbatch_size": sizes[1], "data_axes": as_axes(given["data_axes"])},
    )
    _check_together(options)
    return options


def _check_together(options: Options) -> None:
    """Raises for an option that needs another, or rules it out."""
    if options.roles.carry is not None and not options.has_aux:
        raise ValueError(
            "expected has_aux=True with carry_argnum; got False. The loss returns (loss, (new_carry, rest))."
        )
    if options.roles.limit is not None and not options.presplit:
        raise ValueError("expected presplit=True with count_argnum; got False. It counts the caller's micro-batches.")
    if options.track_noise_scale and not options.return_info:
        raise ValueError("expected return_info=True with track_noise_scale; got False. Estimates come in Info.noise.")
    sharding = [n for n in ("param_specs", "gather_dtype", "grad_specs") if getattr(options, n) is not None]
    sharding += ["shard_sums"] * options.shard_sums
    if sharding and not options.data_axes:
        raise ValueError(
            f"expected data_axes with {sharding[0]}; got None. Name the axes that the batch is sharded over; without "
            "them gradients are sharded as the parameters are."
        )
    needs_each = [name for name in ("skip_nonfinite", "track_noise_scale", "shard_sums") if getattr(options, name)]
    if options.in_place and needs_each:
        raise ValueError(
            f"expected no {needs_each[0]} with in_place=True; got both. It needs each micro-batch's gradient."
        )
