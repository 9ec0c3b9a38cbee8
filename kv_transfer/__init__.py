"""The hand-over of KV blocks between two workers: state machine, leases, frames, transports.

Owns everything on the wire between a prefill and a decode worker. Does not know models, text or
schedulers; works on `KVBytes`, block ids and byte counts. Imports no torch.
"""

from pathlib import Path

from process.kernel_cache import prepare_kernel_cache

prepare_kernel_cache(Path(__file__).parent)
