"""The faults of a trial: their kinds, how a schedule is drawn, and how each is carried out.

Owns everything there is to say about a fault, in a row and a function. Does not know what is
checked.

To add a fault:

1. Name it in `kinds.Kind`, and give it a row in `kinds.ODDS`: how long it lasts, how often it is
   drawn, where it happens, and for which part of the cluster it is meant. A new part gets a line in
   `kinds.Part` and its share of a schedule in `loads.PART_SHARES`.
2. Write what it does, in the module of the place where it happens, and enter the function in that
   module's `FAULTS`:

       wire       one message: lost, late, repeated, damaged
       streams    between two nodes: cut, blocked
       nodes      a whole node: dead, paused, drained, its clock
       workers    inside a worker: blocks, steps, callbacks
       store      the store of members
       prefix_index  the store of the prefix index, and what stands in it
       quotas     the store of quotas, and the clocks by which routers count

   It gets the `Injection` (the cluster, the seed's randomness) and the `Fault` (its victim's
   number, its duration), and calls `bite` once it has changed something: a fault that touched
   nothing proves nothing. If the victim may be taken for dead, it calls `mark_ill`, before and
   after, or I8 takes the product's suspicion for an error.
3. Run `baton simulate faults --seeds 200`. `faults_never_met` names those that never bit.
   `tests/simulation/test_trials.py` runs each kind alone without being told of it.

A new kind changes what every seed draws: seeds noted before show other runs afterwards.
"""
