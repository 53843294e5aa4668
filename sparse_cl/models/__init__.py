"""What is known of a model: its blocks, MLPs and attentions, passes over batches, losses, loading.

``find_blocks``, ``find_mlps`` and ``find_attentions`` recognise the layouts of transformers' decoders;
``linear_layers`` lists the weights inside the blocks by name. ``stream`` runs forward passes while each ``Watch`` sees
what enters or leaves one module.
"""

from .parts import find_attentions, find_blocks, find_mlps, linear_layers
from .passes import Watch, stream

__all__ = ["Watch", "find_attentions", "find_blocks", "find_mlps", "linear_layers", "stream"]
