"""Checkpoints of others, in transformers' format: read into our layers, and written back."""

from linrnn.models.checkpoints.export import export_transformers
from linrnn.models.checkpoints.loading import FAMILIES, load_pretrained

__all__ = ["FAMILIES", "export_transformers", "load_pretrained"]
