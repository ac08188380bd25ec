"""xq: the parts of image tokenizers, as plain PyTorch modules."""

__version__ = "0.1.0"
