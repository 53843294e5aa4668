from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.models.parts import linear_layers
from sparse_cl.models.passes import IGNORED
from sparse_cl.probes.curvature import Curvature, CurvatureProbe, Factors, curvature_overlap, white_spectrum


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(inputs=6, classes=4):
    layer = torch.nn.Linear(inputs, classes, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(0.5 * normal(0, classes, inputs))
        layer.bias.copy_(normal(1, classes))
    return layer


def with_covariance(rows, eigenvalues, seed):
    """Rows whose XᵀX/rows has exactly these eigenvalues."""
    n = len(eigenvalues)
    columns, _ = torch.linalg.qr(normal(seed, rows, n))
    turn, _ = torch.linalg.qr(normal(seed + 1, n, n))
    return columns * rows**0.5 * torch.tensor(eigenvalues, dtype=torch.float64).sqrt() @ turn


def token_batches():
    generator, batches = torch.Generator().manual_seed(3), []
    for rows, length in ((3, 8), (2, 12)):
        ids = torch.randint(1, 256, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        labels = torch.where((torch.rand(rows, length, generator=generator) < 0.5) & mask.bool(), ids, IGNORED)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def test_spectra_of_a_known_covariance_and_a_known_fisher():
    # Of softmax regression S = E[diag(p) - p pᵀ], all labels enumerated.
    planted = [9.0, 4.0, 1.0, 0.25, 0.04, 0.01]
    rows, layer = with_covariance(4000, planted, 5), classifier()
    found = CurvatureProbe(layer, {"head": layer}, samples=40).run(rows.split(500))
    chances = layer(rows).detach().softmax(1)
    fisher = chances.mean(0).diag() - chances.T @ chances / len(rows)
    head = found.layers["head"]
    assert head.input_values.tolist() == pytest.approx(planted, rel=1e-9)
    expected = torch.linalg.eigvalsh(fisher).flip(0)
    assert head.output_values[:3].tolist() == pytest.approx(expected[:3].tolist(), rel=0.01)
    assert float(head.output_values[3]) < 1e-12  # softmax does not change when a constant is added
    assert (found.tokens, found.samples) == (4000, 40)


def test_equal_to_storing_every_token(tiny_llama):
    model, batches, samples = tiny_llama.double(), token_batches(), 2
    layers = linear_layers(model)
    generator = torch.Generator().manual_seed(7)
    rows, deltas, count = {name: [] for name in layers}, {name: [] for name in layers}, 0
    for batch in batches:
        seen, handles = {}, []
        for name, layer in layers.items():
            hook = lambda m, x, y, name=name, seen=seen: seen.__setitem__(name, (x[0], y))  # noqa: E731
            handles.append(layer.register_forward_hook(hook))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for handle in handles:
            handle.remove()
        places = [(i, j - 1) for i, j in (batch["labels"] != IGNORED).nonzero().tolist() if j > 0]
        count += len(places)
        chosen = torch.stack([logits[i, j] for i, j in places])
        for _ in range(samples):
            labels = torch.multinomial(chosen.softmax(1).detach(), 1, generator=generator).flatten()
            nats = -chosen.log_softmax(1).gather(1, labels[:, None]).sum()
            for name, (x, y) in seen.items():
                (delta,) = torch.autograd.grad(nats, y, retain_graph=True)
                deltas[name] += [delta[i, j] for i, j in places]
                rows[name] += [x[i, j].detach() for i, j in places]
    found = CurvatureProbe(model, seed=7, samples=samples).run(batches)
    assert found.tokens == count
    for name in layers:
        x, d = torch.stack(rows[name]), torch.stack(deltas[name])
        for factor, expected in (
            (found.layers[name].inputs, x.T @ x / len(x)),
            (found.layers[name].outputs, d.T @ d / len(d)),
        ):
            assert (factor - expected).norm() < 1e-5 * expected.norm()  # Llama's RMSNorm passes through float32


def test_labels_of_the_data_do_not_matter_only_where_they_are(tiny_llama):
    batches = token_batches()
    wrong = [{**b, "labels": torch.where(b["labels"] == IGNORED, IGNORED, 1)} for b in batches]
    first, second = (CurvatureProbe(tiny_llama).run(some) for some in (batches, wrong))
    for name, factors in first.layers.items():
        assert torch.equal(factors.outputs, second.layers[name].outputs)


def test_transposed_layers():
    torch.manual_seed(0)
    sizes = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 24,
        "vocab_size": 300,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    found = CurvatureProbe(model).run(token_batches()).layers["transformer.h.0.mlp.c_fc"]
    assert (len(found.input_values), len(found.output_values)) == (16, 24)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tiny_llama, frozen, fails):
    model = tiny_llama.train().requires_grad_(not frozen)
    batches = token_batches()
    if fails:
        with pytest.raises(ValueError, match="input_ids"):
            CurvatureProbe(model).run([batches[0], {"attention_mask": torch.ones(1, 2)}])
    else:
        assert all(f.output_values[0] > 0 for f in CurvatureProbe(model).run(batches).layers.values())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())


spectra = st.lists(st.sampled_from([0.0, 1e-9, 1e-4, 0.01, 0.5, 1.0, 3.0, 100.0]), min_size=1, max_size=7)


@given(spectra, spectra, st.sampled_from([0.0, 1e-6, 1e-3, 0.02, 0.5, 1.0, 2.0]))
def test_flat_share_and_effective_directions_are_those_of_the_whole_table(inputs, outputs, threshold):
    a, s = (torch.tensor(sorted(v, reverse=True), dtype=torch.float64) for v in (inputs, outputs))
    factors = Factors(a.diag(), s.diag(), a, s)
    table = s[:, None] * a
    # Products that are the threshold but for rounding may fall on either side.
    bound = threshold * table.max()
    least, most = (float((table <= bound * (1 + e)).double().mean()) for e in (-1e-12, 1e-12))
    assert least <= factors.flat_share(threshold) <= most
    expected = float(table.sum() ** 2 / table.square().sum()) if table.max() > 0 else 0.0
    assert factors.effective_directions() == pytest.approx(expected, rel=1e-9)
    assert factors.trace() == pytest.approx(float(table.sum()), rel=1e-9)


def test_overlap_counts_the_directions_in_common():
    turn, _ = torch.linalg.qr(normal(0, 20, 20))
    spectrum = torch.tensor([9.0, 8, 7, 6] + [0.1] * 16, dtype=torch.float64)
    layer = torch.nn.Linear(20, 3, dtype=torch.float64)
    domains = {}
    for domain, order in (("a", [0, 1, 2, 3]), ("b", [3, 1, 4, 5])):
        columns = turn[:, order + [i for i in range(20) if i not in order]]
        left, _ = torch.linalg.qr(normal(1, 400, 20))
        domains[domain] = CurvatureProbe(layer, {"layer": layer}).run([left * 20 * spectrum.sqrt() @ columns.T])
    found = curvature_overlap(domains, share=0.2)
    assert found["pairs"] == [["a", "b"]]
    assert found["layers"]["layer"]["inputs"] == pytest.approx([2 / 4], abs=1e-9)
    assert found["layers"]["layer"]["inputs_null"] == 4 / 20
    json.dumps([found, domains["a"].to_json()], allow_nan=False)


def test_errors_name_what_is_wrong(tiny_llama):
    batches = token_batches()
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        CurvatureProbe(tiny_llama, samples=0)
    with pytest.raises(ValueError, match="no batch; is the domain empty"):
        CurvatureProbe(tiny_llama).run([])
    outside = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="outside did not run in batch 1"):
        CurvatureProbe(tiny_llama, {"outside": outside}).run(batches)
    inplace = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(inplace=True), torch.nn.Linear(5, 4))
    with pytest.raises(ValueError, match=r"0: its output is changed in place"):
        CurvatureProbe(inplace, {"0": inplace[0]}).run([torch.ones(3, 6)])
    one = CurvatureProbe(inplace, {"2": inplace[2]}).run([torch.ones(3, 6)])
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        curvature_overlap({"a": one, "b": one}, share=0)
    with pytest.raises(ValueError, match="at least two domains, got a"):
        curvature_overlap({"a": one})
    with pytest.raises(ValueError, match="threshold: .* at least 0"):
        one.layers["2"].flat_share(-1)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"activations that are not finite in the logits, batch 1"):
        CurvatureProbe(tiny_llama).run(batches)


@pytest.mark.parametrize(("width", "rows"), [(200, 800), (200, 200), (300, 100)])
def test_white_spectra_are_those_of_white_rows(width, rows):
    drawn = torch.stack([torch.linalg.eigvalsh(x.T @ x / rows) for x in normal(0, 10, rows, width)]).mean(0).flip(0)
    found = white_spectrum(width, rows)
    assert found.shape == (width,)
    assert (found - drawn.clamp(min=0)).abs().max() < 0.05 * drawn[0]
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
    assert int((found == 0).sum()) == max(0, width - rows)


def test_white_factors_are_as_flat_as_their_null_says():
    a, d = normal(0, 500, 80), normal(1, 1000, 60)
    a, s = a.T @ a / 500, d.T @ d / 1000
    factors = Factors(a, s, *(torch.linalg.eigvalsh(moment).flip(0) for moment in (a, s)))
    found = Curvature({"layer": factors}, 500, 2).to_json((0.05, 0.1, 0.2, 0.5, 0.9))["layers"]["layer"]
    assert found["flat"] == pytest.approx(found["flat_null"], abs=0.03)
    assert 0 < found["flat"][1] < 0.3 < found["flat"][3] < 1


def test_halves_are_even_and_odd_batches_and_give_the_ceiling():
    layer = torch.nn.Linear(20, 3, dtype=torch.float64)
    batches = [normal(seed, 30, 20) * torch.linspace(3, 0.1, 20, dtype=torch.float64) for seed in range(5)]
    found = CurvatureProbe(layer, {"layer": layer}).run(batches)
    even, odd = found.layers["layer"].halves
    torch.testing.assert_close(even.inputs, sum(x.T @ x for x in batches[::2]) / 90)
    torch.testing.assert_close(odd.inputs, sum(x.T @ x for x in batches[1::2]) / 60)
    u, v = (torch.linalg.eigh(half.inputs).eigenvectors[:, -4:] for half in (even, odd))
    expected = float((u.T @ v).square().sum()) / 4
    compared = curvature_overlap({"a": found, "b": found}, share=0.2)["layers"]["layer"]
    assert compared["inputs_ceiling"] == pytest.approx([expected] * 2, abs=1e-6)
    assert compared["inputs"] == pytest.approx([1])
    alone = CurvatureProbe(layer, {"layer": layer}).run(batches[:1])
    assert alone.layers["layer"].halves == ()
    assert curvature_overlap({"a": alone, "b": found})["layers"]["layer"]["inputs_ceiling"][0] is None
