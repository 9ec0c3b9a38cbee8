"""The same cluster on virtual time: one thread, one seed, every fault at will.

Owns the virtual loop, the in-memory network, the simulated nodes and the search for seeds that
break a promise. Does not know torch, Ray or sockets.

    search ─▶ trial ─▶ loads      what a seed decides: a cluster, its clients, its faults
                    ─▶ cluster    the product's own routers and workers, on simulated nodes
                    ─▶ faults     carries the schedule out; how to add a fault stands there
                    ─▶ clients, invariants, fairness      check every promise while it runs
                    ─▶ oracle     what each request must answer, computed alone
"""
