"""`baton bench router`: what a router costs, before workers that compute nothing.

Owns the loads, their clients, the stub workers and the figures. Does not know the router's inside:
it is the process of `baton up --local`, measured from without.
"""
