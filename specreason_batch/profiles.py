"""Cost profiles of known hardware, for `simulation`.

The GPUs' figures are arithmetic: weights read at 4.8 TB/s an H200, KV read likewise, prefill at about half the peak
FLOP/s. They were not measured. Those of the toy pair were, on two cores (`python -m benchmarks.profile`).
"""

from specreason_batch.simulated_engine import CostProfile
from specreason_batch.simulation import Hardware

MS = 1e-3

# 32B parameters in bf16: 65 GB of weights, 256 KiB of KV a token; about 60 GB of KV memory beside the weights.
BASE_32B_H200 = CostProfile(
    host_seconds=2 * MS,
    pass_seconds=13.5 * MS,
    kv_token_seconds=0.26 * MS / 5_000,
    prefill_token_seconds=0.101 * MS,
    attention_seconds=0.02 * MS / 11_000,
    kv_capacity_tokens=230_000,
)
# The same over eight H200 by tensor parallelism.
BASE_32B_TP8 = CostProfile(
    host_seconds=2 * MS,
    pass_seconds=1.7 * MS,
    kv_token_seconds=0.11 * MS / 16_000,
    prefill_token_seconds=0.016 * MS,
    kv_capacity_tokens=1_600_000,
)
# 1.5B parameters in bf16: 3 GB of weights, 28 KiB of KV a token.
DRAFT_1_5B_H200 = CostProfile(
    host_seconds=1 * MS,
    pass_seconds=0.7 * MS,
    sequence_seconds=0.03 * MS,
    prefill_token_seconds=0.005 * MS,
    kv_capacity_tokens=1_800_000,
)

H200 = Hardware(draft=DRAFT_1_5B_H200, base=BASE_32B_H200)
H200_TP8 = Hardware(draft=DRAFT_1_5B_H200, base=BASE_32B_TP8)
