"""saferlhf: the lab bench for safety alignment of language models."""

__version__ = "0.1.0"
