"""Text to tokens and back: templates, tokenizers in child processes, detokenizing.

Owns everything that the router knows of text. Does not know placement or workers.
"""
