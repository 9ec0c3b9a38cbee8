"""What a model folder holds, read without torch.

Owns configs, generation defaults and safetensors headers. Does not know tensors' values.
"""
