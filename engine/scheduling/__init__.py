"""What the next step computes, in plain integers: sequences, blocks, order, budget.

Owns the scheduler and the books of the block pool. Does not know tensors, processes or the network.
Imports no torch.
"""
