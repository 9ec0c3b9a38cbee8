"""The Redis of our own, where the config names none.

Owns which server binary is taken and its life. Does not know what is stored in it.
"""
