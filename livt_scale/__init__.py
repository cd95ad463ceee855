"""LiVT at scale: masked pretraining, then balanced fine-tuning, of Vision Transformers on long-tailed images."""

__version__ = "0.1.0"
