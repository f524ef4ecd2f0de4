"""Models made of layers, and what it takes to train and compare them."""

from linrnn.models.backbone import SequenceBackbone
from linrnn.models.checkpoints import export_transformers, load_pretrained
from linrnn.models.classifier import SequenceClassifier
from linrnn.models.language import LanguageModel
from linrnn.models.optim import count_params, match_params, param_groups
from linrnn.models.pretrained import Pretrained

__all__ = [
    "LanguageModel",
    "Pretrained",
    "SequenceBackbone",
    "SequenceClassifier",
    "count_params",
    "export_transformers",
    "load_pretrained",
    "match_params",
    "param_groups",
]
