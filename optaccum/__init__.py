"""Gradient accumulation for JAX."""

from optaccum._instruments.collectives import (
    CollectiveCounts as CollectiveCounts,
    count_collectives as count_collectives,
)
from optaccum._instruments.plan import MicrobatchPlan as MicrobatchPlan, plan_microbatches as plan_microbatches
from optaccum._instruments.verify import VerifyReport as VerifyReport, verify as verify
from optaccum._loss import WeightedMean as WeightedMean
from optaccum._noise_scale import noise_scale as noise_scale
from optaccum._scanning.chunked import chunked as chunked
from optaccum._scanning.microbatched import microbatched as microbatched
from optaccum._scanning.reductions import Last as Last, Max as Max, Min as Min, Stack as Stack, Sum as Sum
from optaccum._scanning.value_and_grad import grad as grad, value_and_grad as value_and_grad
from optaccum._scanning.whole_batch import Info as Info
from optaccum._streaming.accumulate import accumulate as accumulate
from optaccum._streaming.apply_gradients import apply_gradients as apply_gradients
from optaccum._streaming.flush import flush as flush
from optaccum._streaming.from_multi_steps import from_multi_steps as from_multi_steps
from optaccum._streaming.schedule import by_weight as by_weight, until_weight as until_weight
from optaccum._streaming.state import (
    AccumulateState as AccumulateState,
    has_updated as has_updated,
    weight_total as weight_total,
)
from optaccum._streaming.value_and_update import value_and_update as value_and_update

__version__ = "0.2.0"
