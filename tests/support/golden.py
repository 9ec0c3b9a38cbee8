"""What the golden tests ask, and what the tiny model answers."""

MODEL = "baton-tiny"
ASK = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
