"""Gradient accumulation for JAX."""

from optaccum._accumulate import accumulate as accumulate
from optaccum._accumulate_state import (
    AccumulateState as AccumulateState,
    has_updated as has_updated,
    weight_total as weight_total,
)
from optaccum._apply_gradients import apply_gradients as apply_gradients, flush as flush
from optaccum._chunked import chunked as chunked
from optaccum._collectives import (
    CollectiveCounts as CollectiveCounts,
    count_collectives as count_collectives,
)
from optaccum._from_multi_steps import from_multi_steps as from_multi_steps
from optaccum._noise_scale import noise_scale as noise_scale
from optaccum._plan import MicrobatchPlan as MicrobatchPlan, plan_microbatches as plan_microbatches
from optaccum._reductions import (
    Last as Last,
    Max as Max,
    Min as Min,
    Stack as Stack,
    Sum as Sum,
    WeightedMean as WeightedMean,
)
from optaccum._schedule import by_weight as by_weight
from optaccum._value_and_grad import grad as grad, value_and_grad as value_and_grad
from optaccum._verify import VerifyReport as VerifyReport, verify as verify
from optaccum._whole_batch import Info as Info

__version__ = "0.1.0"
