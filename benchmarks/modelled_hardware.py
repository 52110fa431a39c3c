"""The replica that simulated fleets are made of."""

from diptych.planning.rates import WorkerRates

_FLOPS, _BYTES_PER_S, _KV_BYTES = 8 * 600e12, 8 * 4.3e12, 327_680


def llama_70b_on_eight_h200() -> WorkerRates:
    """Llama-3-70B in bfloat16 on eight H200, all of them one worker.

    Source: 140 GFLOP and 320 KiB of KV per token, 80 layers of width 8192; 600 TFLOP/s, 4.3 TB/s
    and 141 GB per GPU. Own judgement: 4 ms of communication per decode step, 200 GB/s per link.
    """
    return WorkerRates(
        prefill_s_per_token=140e9 / _FLOPS,
        prefill_s_per_pair=4 * 80 * 8192.0 / _FLOPS,
        step_s=140e9 / _BYTES_PER_S + 4e-3,
        step_s_per_token=_KV_BYTES / _BYTES_PER_S,
        kv_bytes_per_token=_KV_BYTES,
        link_bytes_per_s=200e9,
        max_num_seqs=256,
        kv_tokens=2_600_000,
    )
