"""Text to tokens and back: templates, tokenizers in processes of their own, detokenizing.

Owns all that the router knows of text. Does not know placement or workers.
"""
