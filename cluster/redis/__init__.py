"""The Redis server that Baton starts when the config names none.

Owns the choice of the server binary, and its life. Does not know what is stored in it.
"""
