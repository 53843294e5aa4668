"""The curvature method: which curvature it keeps, what an update may do to it, and what it reports."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import copy_of, domain, gradients_of, learn, same, weights

from sparse_cl.methods import AdamW, Curvature
from sparse_cl.probes.curvature import CurvatureProbe
from sparse_cl.probes.sampled_gradients import sampled_gradients

LR = 3e-3
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def of_layer(curvature, name):
    factors = curvature.layers[name.removesuffix(".weight")]
    return factors.outputs.double(), factors.inputs.double()


def products(rows, columns):
    """λ_S λ_A and the two eigenbases, by the definition."""
    (s, q), (a, k) = (torch.linalg.eigh(m.double()) for m in (rows, columns))
    return s.clamp(min=0)[:, None] * a.clamp(min=0), q, k


def share_above(change, factors, threshold):
    values, q, k = products(*factors)
    coordinates = (q.mT @ change.double() @ k).square()
    return float(coordinates[..., values > threshold].sum() / coordinates.sum())


def test_the_factors_of_two_domains_and_of_a_protected_text_are_summed(tiny_llama):
    method, model, sums = Curvature("hard", energy=0.5, rest="freeze"), tiny_llama, {}
    for number in range(3):
        if number == 0:
            method.protect(model, domain(0))
        else:
            model = learn(method, model, domain(number), lr=LR)
        seen = CurvatureProbe(model).run(domain(number))
        for name in seen.layers:
            pair = of_layer(seen, name)
            sums[name] = pair if number == 0 else tuple(a + b for a, b in zip(sums[name], pair, strict=True))
    assert set(method.factors) == {f"{name}.weight" for name in sums}
    assert len(sums) == 14
    for name, pair in sums.items():
        for ours, expected in zip(method.factors[f"{name}.weight"], pair, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_new_domain_keeps_out_of_curved_directions(tiny_llama, scope):
    method = Curvature("hard", energy=0.8, scope=scope, rest="freeze")
    model = learn(method, tiny_llama, domain(0), lr=LR)
    factors, thresholds = dict(method.factors), {name: p.threshold for name, p in method.projections.items()}
    assert (len(set(thresholds.values())) == 1) == (scope == "model")
    above = {name: products(*pair)[0] for name, pair in factors.items()}
    energies = {name: (values * (values > thresholds[name])).sum() for name, values in above.items()}
    if scope == "model":
        explained = [sum(energies.values()) / sum(values.sum() for values in above.values())]
    else:
        explained = [energies[name] / above[name].sum() for name in factors]
    assert all(0.8 <= share < 0.95 for share in explained)

    before = weights(model)
    after = weights(learn(method, model, domain(1), lr=LR, steps=20))
    for name, pair in factors.items():
        change = after[name].double() - before[name].double()
        assert change.norm() > 1e-3
        assert share_above(change, pair, thresholds[name]) <= 1e-6
        rows, columns = (factor.double() for factor in pair)
        weighted = torch.trace(rows @ change @ columns @ change.mT)
        assert weighted <= thresholds[name] * change.square().sum() * 1.001
    rest = set(before) - set(factors)
    assert {EMBEDDING, NORM} < rest
    assert all(torch.equal(before[name], after[name]) for name in rest), "frozen once there is curvature"


def test_soft_lies_between_adamw_and_hard(tiny_llama):
    """In the curved directions: less is moved the smaller the threshold, and no more than by AdamW."""
    moved = []
    for method in (
        AdamW(),
        Curvature("soft", 0.3, rest="freeze"),
        Curvature("soft", 0.9, rest="freeze"),
        Curvature("hard", 0.9, rest="freeze"),
    ):
        model = copy_of(tiny_llama)
        observer = Curvature("hard", 0.9, rest="freeze")
        observer.protect(model, domain(0))
        if isinstance(method, Curvature):
            method.protect(model, domain(0))
        before = weights(model)
        after = weights(learn(method, model, domain(1), lr=LR, steps=10))
        rows, columns = (factor.double() for factor in observer.factors[DOWN])
        change = (after[DOWN] - before[DOWN]).double()
        moved.append(float(torch.trace(rows @ change @ columns @ change.mT)))
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2] > 1.2**2 * moved[3]


def test_the_first_domain_is_adamw_s(tiny_llama):
    other = weights(learn(AdamW(), copy_of(tiny_llama), domain(0), lr=LR))
    for name, p in weights(learn(Curvature(), tiny_llama, domain(0), lr=LR)).items():
        torch.testing.assert_close(p, other[name], rtol=1e-5, atol=1e-6)


def test_damped_embeddings_and_norms(tiny_llama):
    method = Curvature("soft", energy=0.8, rest="damp")
    model = learn(method, tiny_llama, domain(0), lr=LR)
    squares = 0
    rows, columns = (
        torch.zeros(len(tiny_llama.lm_head.weight), dtype=torch.float64),
        torch.zeros(16, 16, dtype=torch.float64),
    )

    def note(gradients):
        nonlocal squares
        squares = squares + gradients[NORM].double().square()
        g = gradients[EMBEDDING].double()
        rows.add_(g.square().sum(1))
        columns.add_(g.mT @ g)

    rest = {name: p for name, p in model.named_parameters() if name not in method._weights(model)}
    tokens = sampled_gradients(model, rest, domain(0), note)
    torch.testing.assert_close(method.factors[NORM][0].double(), squares / tokens, rtol=1e-4, atol=0)
    ours = torch.outer(*(factor.double().flatten() for factor in method.factors[EMBEDDING]))
    expected = torch.outer(rows / tokens, (columns / columns.trace()).flatten())
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))

    before = weights(model)
    after = weights(learn(method, model, domain(1), lr=LR))
    assert not torch.equal(before[EMBEDDING], after[EMBEDDING])
    assert not torch.equal(before[NORM], after[NORM])
    # Entry i of the norm's update, by τ/(τ + F_i); with the cross terms of two domains, as everywhere.
    projection, update = method.projections[NORM], torch.ones(16)
    projection.apply_(update)
    fisher = method.factors[NORM][0].double() * method.factors[NORM][1].double().flatten()
    expected = projection.threshold / (projection.threshold + fisher)
    torch.testing.assert_close(update.double(), expected, rtol=1e-5, atol=0)


def test_what_is_reported_is_what_happened(tiny_llama):
    method = Curvature("hard", energy=0.8, rest="freeze")
    model = learn(method, tiny_llama, domain(0), lr=LR)
    first = method.record()["layers"]
    factors, thresholds = dict(method.factors), {name: p.threshold for name, p in method.projections.items()}
    before = weights(model)
    gradients = gradients_of(model, domain(1)[:4])
    model = learn(method, model, domain(1), lr=LR)
    second = method.record()["layers"]
    assert set(first) == set(second) == set(factors)
    for name, pair in factors.items():
        values = products(*pair)[0]
        used = int((values > thresholds[name]).sum())
        width = values.numel()
        assert first[name] == {"surviving": 1.0, "leak": None, "width": width, "used": used, "free": width - used}
        inside = share_above(gradients[name], pair, thresholds[name])
        assert second[name]["surviving"] == pytest.approx(1 - inside, abs=1e-5)
        change = model.get_parameter(name).detach() - before[name]
        assert second[name]["leak"] == pytest.approx(share_above(change, pair, thresholds[name]), rel=0.2, abs=1e-12)
        now = products(*method.factors[name])[0] > method.projections[name].threshold
        assert second[name]["used"] == now.sum()


@pytest.mark.parametrize("settings", [{"mode": "hard", "rest": "freeze"}, {"scope": "model"}])
def test_a_resumed_run_goes_on_with_the_same_bits(tiny_llama, tmp_path, settings):
    base, method, model = copy_of(tiny_llama), Curvature(**settings), tiny_llama
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), lr=LR, folder=folder)
    model = learn(method, model, domain(2), lr=LR)
    other = Curvature(**settings)
    resumed = other.restore(base, folders)
    resumed = learn(other, resumed, domain(2), lr=LR)
    assert same(weights(model), weights(resumed))
    assert method.record() == other.record()


def test_a_damaged_file(tiny_llama, tmp_path):
    learn(Curvature(), tiny_llama, domain(0), lr=LR, folder=tmp_path)
    path = tmp_path / "curvature.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"curvature\.safetensors: not a readable curvature file"):
        Curvature().restore(tiny_llama, [tmp_path])


def test_weights_that_are_transposed():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)
    model = transformers.AutoModelForCausalLM.from_config(config)
    method = Curvature("hard", energy=0.8, rest="freeze")
    method.check(model)
    model = learn(method, model, domain(0), lr=LR)
    name = "transformer.h.0.mlp.c_fc.weight"
    columns, rows = of_layer(CurvatureProbe(model).run(domain(0)), name)
    before, threshold = weights(model), method.projections[name].threshold
    after = weights(learn(method, model, domain(1), lr=LR))
    assert before[name].shape == (16, 64)
    assert share_above(after[name] - before[name], (rows, columns), threshold * (1 + 1e-4)) <= 1e-6


def test_measuring_changes_no_mode_no_flag_and_no_gradient(tiny_llama):
    method = Curvature(rest="damp")
    tiny_llama.train()
    tiny_llama.model.norm.weight.requires_grad_(False)
    state = weights(tiny_llama)
    method.before_domain(tiny_llama, domain(0))
    method.after_domain(tiny_llama, domain(0))
    method.before_domain(tiny_llama, domain(1))
    assert tiny_llama.training
    assert [name for name, p in tiny_llama.named_parameters() if not p.requires_grad] == [NORM]
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert same(state, weights(tiny_llama))


def test_a_model_in_which_nothing_is_curved(tiny_llama):
    """Where every prediction is certain, nothing is to be protected, and no threshold is to be had."""
    method = Curvature()
    with torch.no_grad():
        tiny_llama.model.norm.weight.zero_()
    tiny_llama.lm_head.weight = torch.nn.Parameter(torch.zeros_like(tiny_llama.lm_head.weight))
    method.protect(tiny_llama, domain(0))
    assert not any(p.any for p in method.projections.values())


def test_little_that_survives_is_told(tiny_llama):
    method = Curvature("hard", energy=0.9999)
    model = learn(method, tiny_llama, domain(0), lr=LR)
    with pytest.warns(UserWarning, match=r"curvature: less than 10% .* in \d+ of 14 layers"):
        method.before_domain(model, domain(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "firm"}, "mode: expected 'hard' or 'soft', got 'firm'"),
        ({"scope": "row"}, "scope: expected 'layer' or 'model', got 'row'"),
        ({"rest": "train"}, "rest: expected 'freeze' or 'damp', got 'train'"),
        ({"energy": 0.0}, r"energy: expected a share in \(0, 1\], got 0.0"),
        ({"samples": 0}, "samples: expected a number of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curvature(**arguments)
