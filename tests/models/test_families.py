"""In a model of each family the probes see what keeping everything gives."""

import pytest
import torch
from cases.families import FAMILIES, make

from sparse_cl import SparseMaskedAdamW
from sparse_cl.models.parts import find_mlps, is_transposed, linear_layers, matrix_of
from sparse_cl.probes import ActivationProbe, GradientProbe, InputProbe

ANSWERS = slice(5, None)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param, FAMILIES[request.param])


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        ids = torch.randint(0, 64, (3, 12), generator=generator)
        labels = ids.clone()
        labels[:, :5] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def inputs_of(model, layer, batches):
    """What enters a layer at the answer tokens: (tokens, width)."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return torch.cat([x.reshape(3, 12, -1)[:, ANSWERS].flatten(0, 1) for x in seen]).double()


def test_activations_are_those_that_enter_the_layer_out_of_the_neurons(model, batches):
    means = ActivationProbe(model).run(batches).mean()
    for mlp in find_mlps(model):
        expected = inputs_of(model, mlp.out, batches).abs().mean(0)
        torch.testing.assert_close(means[mlp.name], expected, rtol=1e-5, atol=1e-7)


def test_moments_are_those_of_each_layers_inputs(model, batches):
    seen = InputProbe(model).run(batches)
    layers = linear_layers(model)
    assert sorted(name for group in seen.layers.values() for name in group) == sorted(layers)
    for name, group in seen.layers.items():
        moment = sum(half.moment.double() for half in seen.halves[name])
        for layer in group:
            rows = inputs_of(model, layers[layer], batches)
            torch.testing.assert_close(moment, rows.mT @ rows, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_mean_loss_of_all_answer_tokens(model, batches):
    found = GradientProbe(model).run(batches)
    layers = linear_layers(model)
    logits = torch.cat([model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, 4:-1] for b in batches])
    targets = torch.cat([b["input_ids"][:, ANSWERS] for b in batches])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
        expected = gradient.mT if is_transposed(layer) else gradient
        torch.testing.assert_close(found.layers[name], expected, rtol=1e-4, atol=1e-6)


def test_a_step_through_the_masks_moves_the_chosen_neurons_and_nothing_else(model, batches):
    scores = ActivationProbe(model).run(batches)
    masks = scores.top(0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if name in masks]
    optimizer = SparseMaskedAdamW(trained, lr=1e-2, masks=masks)
    x = batches[0]
    model(x["input_ids"], attention_mask=x["attention_mask"], labels=x["labels"]).loss.backward()
    optimizer.step()
    model.zero_grad()
    for mlp, mean in zip(find_mlps(model), scores.mean().values(), strict=True):
        chosen = torch.zeros(24, dtype=torch.bool)
        chosen[mean.topk(6).indices] = True
        moved = matrix_of(mlp.out, "") != matrix_of_before(before, mlp.out_name, mlp.out)
        assert torch.equal(moved.any(0), chosen)
        for name, layer in mlp.into.items():
            rows = (matrix_of(layer, "") != matrix_of_before(before, name, layer)).any(1)
            assert torch.equal(rows, chosen.repeat(2 if mlp.layout.stacked else 1))
    for name, parameter in model.named_parameters():
        if name not in masks:
            assert torch.equal(parameter, before[name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


def matrix_of_before(before, name, layer):
    weight = before[f"{name}.weight"]
    return weight.mT if is_transposed(layer) else weight
