"""Everything about Redis: the stores over its client, and the server that Baton starts itself.

Owns the client, the keys and commands of each store, the choice of the server binary, and its
life. Does not know what is stored.
"""
