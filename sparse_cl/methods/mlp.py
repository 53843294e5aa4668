"""The MLPs of a transformer: where a neuron's weights are, and how active the neurons are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .base import Batch


@dataclass(frozen=True)
class Layout:
    """Names of an MLP's linear layers, children of one module: into the neurons, and out of them.

    `stacked`: the one layer into the neurons holds gate and up on top of each other (2·neurons outputs).
    """

    into: tuple[str, ...]
    out: str
    stacked: bool = False


LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Mistral, Gemma
    Layout(("gate_up_proj",), "down_proj", stacked=True),  # Phi-3, GLM-4
    Layout(("fc1",), "fc2"),  # OPT, Phi
    Layout(("c_fc",), "c_proj"),  # GPT-2, GPT-Neo
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom
)


@dataclass(frozen=True)
class MLP:
    """One MLP of a model. `name` is the module's; `into` and `out` are its linear layers by full name."""

    name: str
    layout: Layout
    into: dict[str, nn.Module]
    out: nn.Module
    out_name: str

    @property
    def neurons(self) -> int:
        """Number of neurons: inputs of the layer out of them."""
        return self.out.weight.shape[0 if is_transposed(self.out) else 1]


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is (in, out): GPT-2's Conv1D. Recognised by name, as transformers is not imported here."""
    return type(layer).__name__ == "Conv1D"


def find_mlps(model: nn.Module) -> list[MLP]:
    """Every MLP of the model with one of `LAYOUTS`, in the order of its modules.

    Raises:
        ValueError: there is none, or one whose layers have no plain matrix (a quantized one).
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for layout in LAYOUTS:
            if not all(child in children for child in (*layout.into, layout.out)):
                continue
            prefix = f"{name}." if name else ""
            for child in (*layout.into, layout.out):
                if not isinstance(children[child], nn.Linear) and not is_transposed(children[child]):
                    raise ValueError(
                        f"{prefix}{child} is a {type(children[child]).__name__}; neurons can be chosen in "
                        "torch.nn.Linear and transformers' Conv1D only. Load the model unquantized"
                    )
            into = {f"{prefix}{child}": children[child] for child in layout.into}
            found.append(MLP(name, layout, into, children[layout.out], f"{prefix}{layout.out}"))
            break
    if not found:
        looked_for = "; ".join(" + ".join((*layout.into, layout.out)) for layout in LAYOUTS)
        kinds = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "weight")})
        raise ValueError(
            f"{type(model).__name__} has no MLP that is known here. Looked for modules with the children: "
            f"{looked_for}. Its layers with a weight are called: {', '.join(kinds)}. "
            "Add a Layout to sparse_cl/methods/mlp.py"
        )
    return found


@torch.no_grad()
def mean_activation(model: nn.Module, mlps: list[MLP], batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Mean |activation| of each neuron over the tokens that are not padding: for each MLP a (neurons,) tensor.

    A neuron's activation is what enters the layer out of the neurons: act(gate(x))·up(x), or act(fc1(x)).
    Run in evaluation mode; the model's mode is put back.
    """
    sums = [torch.zeros(mlp.neurons, dtype=torch.float64, device=mlp.out.weight.device) for mlp in mlps]
    tokens = 0
    keep: torch.Tensor | None = None

    def hook(total: torch.Tensor):
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            # OPT flattens (batch, length) before its MLP.
            activation = inputs[0].reshape(-1, inputs[0].shape[-1])
            total.add_(activation[keep.to(activation.device)].abs().sum(0, dtype=torch.float64))

        return add

    handles = [mlp.out.register_forward_pre_hook(hook(total)) for mlp, total in zip(mlps, sums, strict=True)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            keep = batch["attention_mask"].flatten().bool()
            tokens += int(keep.sum())
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not tokens:
        raise ValueError("no token to measure activations on: the batches are empty")
    return [total / tokens for total in sums]
