"""The elastic method: what it remembers of inputs, how far a domain may go, and what it reports."""

from __future__ import annotations

import pytest
import torch
from cases.families import FAMILIES, MIXTURES, make
from cases.methods import copy_of, domain, gradients_of, inputs_of, learn, same, weights
from cases.rules import rms

from sparse_cl.methods import AdamW, Elastic
from sparse_cl.optim import SparseMaskedAdamW

LR = 3e-3
WHOLE = {"energy": 1.0, "max_rank": None}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = [
    f"model.layers.{i}.{name}_proj"
    for i in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
TRACKED = {f"{name}.weight": name for name in LAYERS} | {EMBEDDING: "lm_head"}


def moment_by_hand(model, layer, batches):
    """Mean x xᵀ of a layer's input over what is not padding; float64."""
    rows = inputs_of(model, layer, batches).double()
    return rows.mT @ rows / len(rows)


def known(method):
    """By weight U diag(λ) Uᵀ, float64."""
    found = {name: method.memory.subspace(name).to(dtype=torch.float64) for name in method.memory.names}
    return {name: subspace.basis * subspace.values @ subspace.basis.mT for name, subspace in found.items()}


def untied(model):
    other = copy_of(model)
    other.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    other.config.tie_word_embeddings = False
    return other


def test_what_is_remembered_is_each_text_s_mean_over_its_tokens(tiny_llama):
    method, model, inputs = Elastic(**WHOLE, text_weight=0.5), tiny_llama, dict.fromkeys(TRACKED, 0.0)
    for number, weight in enumerate((0.5, 1.0, 1.0)):
        batches = domain(number, count=2 * number or 5)
        if number == 0:
            method.protect(model, batches)
        else:
            model = learn(method, model, batches, lr=LR)
        for name, layer in TRACKED.items():
            inputs[name] = inputs[name] + weight * moment_by_hand(model, layer, batches)
    assert known(method).keys() == inputs.keys()
    for name, moment in known(method).items():
        torch.testing.assert_close(moment, inputs[name], rtol=1e-4, atol=1e-5 * float(inputs[name].abs().max()))


@pytest.mark.parametrize("tied", [True, False])
def test_pulls_are_as_strong_as_the_inputs_are_used(tiny_llama, tied):
    """κ, in units of 1 / rms W₀, is as a matrix strength · texts · A n / tr A."""
    model = tiny_llama if tied else untied(tiny_llama)
    method = Elastic(strength=3.0, text_weight=1.5, **WHOLE)
    method.protect(model, domain(2))
    model = learn(method, model, domain(0), lr=LR)
    method.before_domain(model, domain(1))
    optimizer = method.make_optimizer(model, LR)
    head = EMBEDDING if tied else HEAD
    assert set(optimizer.projections) == {*(f"{name}.weight" for name in LAYERS), head, EMBEDDING}
    assert EMBEDDING not in optimizer.rest and NORM in optimizer.rest
    for name, moment in known(method).items():
        pull = optimizer.projections[name].subspace.to(dtype=torch.float64)
        expected = 3.0 * 2.5 * moment * len(moment) / moment.trace()
        kappa = pull.basis * pull.values @ pull.basis.mT
        torch.testing.assert_close(kappa, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def furthest(steps, betas=(0.9, 0.999)):
    """The most |m̂|/√v̂ can be after so many steps, whatever the gradients were (Cauchy-Schwarz)."""
    most = 0.0
    for t in range(1, steps + 1):
        first = [(1 - betas[0]) * betas[0] ** (t - i) / (1 - betas[0] ** t) for i in range(1, t + 1)]
        second = [(1 - betas[1]) * betas[1] ** (t - i) / (1 - betas[1] ** t) for i in range(1, t + 1)]
        most = max(most, sum(a * a / b for a, b in zip(first, second, strict=True)) ** 0.5)
    return most


@pytest.mark.parametrize("strength", [0.01, 1.0, 5000.0])
def test_a_domain_goes_no_further_than_each_direction_s_pull_lets_it(tiny_llama, strength):
    """A step is at most lr·b along a direction; each ends with a division by 1 + lr·κ, so that the sum stays below b/κ.

    With one second moment a row, b is √n times what it is of one entry.
    """
    method, steps = Elastic(strength=strength, max_rank=4), 20
    model = learn(method, tiny_llama, domain(0), lr=LR)
    before, used = weights(model), {name: method.memory.subspace(name) for name in method.memory.names}
    after, tight = weights(learn(method, model, domain(1), lr=LR, steps=steps)), 0
    for name, subspace in used.items():
        basis = subspace.basis.double()
        start, change = before[name].double() @ basis, (after[name].double() - before[name].double()) @ basis
        kappa = strength / rms(before[name]) * subspace.usage.double()
        bound = (furthest(steps) * len(basis) ** 0.5) + 0.01 * (start.abs().amax() + change.abs().amax())
        limit = torch.minimum(steps * LR * bound, bound / kappa) + 1e-6
        assert (change.abs() <= limit).all()
        assert (after[name] - before[name]).norm() > 1e-3
        tight += int((limit < LR * bound).sum())
    assert (tight > 0) == (strength > 100), "a strong pull keeps directions within less than one step"
    assert not torch.equal(before[NORM], after[NORM]), "norms learn on"


@pytest.mark.parametrize("gpt2", [False, True])
def test_the_stronger_the_less_outputs_for_earlier_inputs_change(tiny_llama, gpt2):
    given, changes = make("GPT2", FAMILIES["GPT2"] | {"vocab_size": 300}) if gpt2 else tiny_llama, []
    for strength in (0.0, 5.0, 500.0):
        method, model = Elastic(strength, **WHOLE), copy_of(given)
        model = learn(method, model, domain(0), lr=LR)
        names = [name for name in method.memory.names if method.memory.domains]
        layers = {name: name.removesuffix(".weight") for name in names if "embed" not in name and "wte" not in name}
        moments = {name: moment_by_hand(model, layer, domain(0)) for name, layer in layers.items()}
        before = weights(model)
        after = weights(learn(method, model, domain(1), lr=LR, steps=10))
        changes.append(0.0)
        for name, moment in moments.items():
            change = (after[name] - before[name]).double()
            change = change.mT if method.memory.is_transposed(name) else change
            changes[-1] += float((change @ moment).mul(change).sum() / moment.trace())
    assert changes[0] > 1.5 * changes[1] > 1.5**2 * changes[2]


class Plain(AdamW):
    """AdamW by our own step, and by row after a first domain."""

    second_moment = "entry"

    def make_optimizer(self, model, lr):
        made = SparseMaskedAdamW(model.named_parameters(), lr=lr, second_moment=self.second_moment)
        self.second_moment = "row"
        return made


def test_the_first_domain_and_a_strength_of_zero_are_adamw(tiny_llama):
    method, plain = Elastic(strength=0.0), Plain()
    ours, other, first = tiny_llama, copy_of(tiny_llama), copy_of(tiny_llama)
    reference = copy_of(tiny_llama)
    for number in range(2):
        ours = learn(method, ours, domain(number), lr=LR)
        other = learn(plain, other, domain(number), lr=LR)
        assert same(weights(ours), weights(other))
        if number == 0:
            assert same(weights(learn(Elastic(), first, domain(0), lr=LR)), weights(other))
            torchs = weights(learn(AdamW(), reference, domain(0), lr=LR))
            for name, p in weights(other).items():
                torch.testing.assert_close(p, torchs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"), [({}, False), (WHOLE, False), ({"strength": 0.5, "text_weight": 2.0}, True)]
)
def test_a_resumed_run_goes_on_with_the_same_bits(tiny_llama, tmp_path, settings, text):
    base, method, model = copy_of(tiny_llama), Elastic(**settings), tiny_llama
    if text:
        method.protect(model, domain(3))
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), lr=LR, folder=folder)
    model = learn(method, model, domain(2), lr=LR)
    other = Elastic(**settings)
    resumed = learn(other, other.restore(base, folders), domain(2), lr=LR)
    assert same(weights(model), weights(resumed))
    assert method.record() == other.record()
    assert same(known(method), known(other))


def test_a_damaged_file(tiny_llama, tmp_path):
    learn(Elastic(), tiny_llama, domain(0), lr=LR, folder=tmp_path)
    path = tmp_path / "sparse_cl" / "memory.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"memory\.safetensors: not a readable memory file"):
        Elastic().restore(tiny_llama, [tmp_path])


def share_used(matrix, moment, texts):
    """Σ h C² / Σ C² and Σ h with h = (λ/μ)/(1 + λ/μ), in float64, without eigenvectors: h(A) = A (A + μ)⁻¹."""
    matrix, moment = matrix.double(), moment.double()
    mean = moment.trace() / len(moment) / texts
    used = moment @ torch.linalg.inv(moment + mean * torch.eye(len(moment), dtype=torch.float64))
    return float((matrix @ used).mul(matrix).sum() / matrix.square().sum()), float(used.trace())


def test_what_is_reported_is_what_happened(tiny_llama):
    method = Elastic(**WHOLE)
    model = learn(method, tiny_llama, domain(0), lr=LR)
    first, moments, before = method.record()["layers"], known(method), weights(model)
    batches = domain(1, count=6)
    gradients = gradients_of(model, batches[:4])
    after = weights(learn(method, model, batches, lr=LR))
    second = method.record()["layers"]
    assert set(first) == set(second) == set(TRACKED)
    for name, moment in moments.items():
        width = before[name].shape[1]
        used = round(share_used(before[name], moment, 1)[1])
        assert first[name] == {"surviving": 1.0, "leak": None, "width": width, "used": used, "free": width - used}
        taken = share_used(gradients[name].flatten(0, 1), moment, 1)[0]
        assert second[name]["surviving"] == pytest.approx(1 - taken, abs=1e-5)
        change = after[name].double() - before[name].double()
        assert second[name]["leak"] == pytest.approx(share_used(change, moment, 1)[0], rel=1e-3)
        assert second[name]["used"] == round(share_used(change, known(method)[name], 2)[1])


def test_measuring_changes_no_mode_no_flag_and_no_gradient(tiny_llama):
    method = Elastic()
    tiny_llama.train()
    tiny_llama.model.norm.weight.requires_grad_(False)
    state = weights(tiny_llama)
    method.protect(tiny_llama, domain(2))
    method.before_domain(tiny_llama, domain(0))
    method.after_domain(tiny_llama, domain(0))
    assert tiny_llama.training
    assert [name for name, p in tiny_llama.named_parameters() if not p.requires_grad] == [NORM]
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert same(state, weights(tiny_llama))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength: expected a number of at least 0, got -1.0"),
        ({"strength": float("inf")}, "strength: expected a number of at least 0, got inf"),
        ({"energy": 0.0}, r"energy: expected a share in \(0, 1\], got 0.0"),
        ({"text_weight": 0.0}, "text_weight: expected a number above 0, got 0.0"),
        ({"text_weight": float("inf")}, "text_weight: expected a number above 0, got inf"),
        ({"max_rank": 0}, "max_rank: expected a number of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Elastic(**arguments)


def test_settings_are_recorded():
    given = {"strength": 3.0, "row_strength": 0.1, "every": 2, "energy": 0.5, "max_rank": 99, "text_weight": 2.0}
    assert Elastic(**given).settings() == given


def test_models_of_any_kind_but_mixtures(tiny_llama):
    for model in (tiny_llama, make("GPT2", FAMILIES["GPT2"])):
        Elastic().check(model)
    with pytest.raises(ValueError, match=r"is a mixture of experts .* elastic would train unprotected"):
        Elastic().check(make("Mixtral", MIXTURES["Mixtral"]))
    with pytest.raises(ValueError, match="max_rank: expected at most the width of the widest layer, 24"):
        Elastic(max_rank=25).check(tiny_llama)


@pytest.mark.parametrize("frozen", [EMBEDDING, "model.layers.0."])
def test_what_the_caller_froze_stays_and_the_rest_learns_on(tiny_llama, frozen):
    method, model = Elastic(), untied(tiny_llama)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    method.protect(model, domain(2))
    before = weights(model)
    for number in range(2):
        model = learn(method, model, domain(number), lr=LR)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(frozen), name
        assert p.requires_grad != name.startswith(frozen)


def test_a_text_that_cannot_be_read_protects_nothing(tiny_llama):
    method, other = Elastic(), copy_of(tiny_llama)
    with pytest.raises(ValueError, match="nothing was observed"):
        method.protect(tiny_llama, [])
    assert method.memory is None
    method.protect(tiny_llama, domain(0))
    fresh = Elastic()
    fresh.protect(other, domain(0))
    assert same(known(method), known(fresh))


def test_an_input_that_is_always_zero_has_no_used_direction(tiny_llama):
    method = Elastic()
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight.zero_()
    method.protect(tiny_llama, domain(0))
    assert method.memory.rank("model.layers.0.mlp.down_proj.weight") == 0
    learn(method, tiny_llama, domain(1), lr=LR)
    assert all(bool(p.isfinite().all()) for p in tiny_llama.parameters())
