"""What is known of a model: its blocks, MLPs and attentions, passes over batches, losses, loading."""

from .parts import find_attentions, find_blocks, find_mlps, linear_layers
from .passes import Watch, stream

__all__ = ["Watch", "find_attentions", "find_blocks", "find_mlps", "linear_layers", "stream"]
