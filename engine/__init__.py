"""One model on one rank group: weights, layers, attention, KV tensors, block ids, scheduling.

Owns everything between a step plan and its tokens. Does not know the network or other workers.
Importing this package imports no torch; the modules a rank runs do.
"""

from pathlib import Path

from process.kernel_cache import prepare_kernel_cache

prepare_kernel_cache(Path(__file__).parent)
