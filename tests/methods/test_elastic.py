"""The elastic method: what it remembers of inputs and tokens, how far a domain may go, and what it reports."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import copy_of, domain, gradients_of, inputs_of, learn, same, weights

from sparse_cl.methods import AdamW, Elastic
from sparse_cl.optim import SparseMaskedAdamW

LR = 3e-3
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
BLOCK = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
READERS = {"self_attn.k_proj": BLOCK[0], "self_attn.v_proj": BLOCK[0], "mlp.up_proj": BLOCK[2]}
INPUTS = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK] + ["lm_head"]
LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in (*BLOCK, *READERS)]


def input_of(layer):
    """The first layer that reads what this layer reads."""
    for name, first in READERS.items():
        layer = layer.replace(name, first)
    return layer


def moments_by_hand(model, batches):
    """Mean x xᵀ of every layer's input, and the share of each token, over what is not padding; float64."""
    found = {}
    for name in [*LAYERS, "lm_head"]:
        rows = inputs_of(model, name, batches).double()
        found[name] = sum(torch.outer(row, row) for row in rows) / len(rows)
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]).tolist()
    shares = torch.tensor([ids.count(v) / len(ids) for v in range(model.config.vocab_size)], dtype=torch.float64)
    return found, shares


def untied(model):
    other = copy_of(model)
    other.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    other.config.tie_word_embeddings = False
    return other


def strength_by_hand(method, layer, texts):
    """κ as a matrix, of which q_jᵀ κ q_j is the pull of direction j: strength · texts · A n / tr A."""
    moment = method.usage.moments[input_of(layer)].double()
    return method.strength * texts * moment * len(moment) / moment.trace()


def test_what_is_remembered_is_each_text_s_mean_over_its_tokens(tiny_llama):
    method, model = Elastic(text_weight=0.5), tiny_llama
    inputs, tokens = {name: 0.0 for name in [*LAYERS, "lm_head"]}, 0.0
    for number, weight in enumerate((0.5, 1.0, 1.0)):
        if number == 0:
            method.protect(model, domain(0))
        else:
            model = learn(method, model, domain(number, count=2 * number), lr=LR)
        found, shares = moments_by_hand(model, domain(number, count=2 * number if number else 5))
        inputs = {name: inputs[name] + weight * moment for name, moment in found.items()}
        tokens = tokens + weight * shares
    assert set(method.usage.moments) == {*INPUTS, "tokens"}
    torch.testing.assert_close(method.usage.moments["tokens"].double(), tokens, rtol=1e-6, atol=0)
    for name, moment in inputs.items():
        ours = method.usage.moments[input_of(name)].double()
        torch.testing.assert_close(ours, moment, rtol=1e-4, atol=1e-6 * float(moment.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
def test_pulls_are_as_strong_as_the_inputs_and_tokens_are_used(tiny_llama, tied):
    model = tiny_llama if tied else untied(tiny_llama)
    method = Elastic(strength=30.0, token_strength=0.2, text_weight=1.5)
    method.protect(model, domain(2))
    model = learn(method, model, domain(0), lr=LR)
    start = weights(model)
    method.before_domain(model, domain(1))
    pulls = method.make_optimizer(model, LR).projections
    assert set(pulls) == {*(f"{name}.weight" for name in LAYERS), EMBEDDING, *([] if tied else [HEAD])}
    for name in [*LAYERS, "lm_head"]:
        pull = pulls[EMBEDDING if tied and name == "lm_head" else f"{name}.weight"]
        turn = pull.turn.double()
        torch.testing.assert_close(turn @ turn.mT, torch.eye(len(turn), dtype=torch.float64), rtol=0, atol=1e-6)
        expected = strength_by_hand(method, name, texts=2.5)
        torch.testing.assert_close(
            (turn * pull.columns.double()) @ turn.mT, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    rows = pulls[EMBEDDING].rows.double().flatten()
    shares = method.usage.moments["tokens"].double()
    torch.testing.assert_close(rows, 30.0 * 0.2 * len(shares) * shares, rtol=1e-5, atol=0)
    assert (rows == 0).sum() > 100, "of tokens that no text has"
    assert (pulls[EMBEDDING].columns is not None) == tied
    assert all(pulls[f"{name}.weight"].rows is None for name in LAYERS)
    # Where nothing was learned nothing is pulled: the anchors are the weights as they are.
    for name, pull in pulls.items():
        assert torch.equal(pull.anchor, start[name])


@pytest.mark.parametrize("max_width", [0, 16])
def test_of_wide_inputs_each_feature_counts_by_itself(tiny_llama, max_width):
    """The MLPs' outputs read 24 features, all else 16: as with full moments, of which the diagonal alone is taken."""
    full, method = Elastic(strength=30.0, text_weight=0.5), Elastic(30.0, text_weight=0.5, max_width=max_width)
    wide = [name for name in [*LAYERS, "lm_head"] if max_width == 0 or "down_proj" in name]
    pulls = []
    for each in (full, method):
        model = copy_of(tiny_llama)
        each.protect(model, domain(2))
        each.before_domain(model, domain(0))
        each.after_domain(model, domain(0))
        each.before_domain(model, domain(1))
        pulls.append(each.make_optimizer(model, LR).projections)
    assert set(method.usage.moments) == set(full.usage.moments)
    for name in wide:
        diagonal = full.usage.moments[input_of(name)].diagonal()
        torch.testing.assert_close(method.usage.moments[input_of(name)], diagonal, rtol=1e-5, atol=0)
    assert set(pulls[0]) == set(pulls[1])
    for name, pull in pulls[1].items():
        layer = "lm_head" if name == EMBEDDING else name.removesuffix(".weight")
        if layer in wide:
            expected = strength_by_hand(full, layer, texts=1.5).diagonal()
            assert pull.turn is None
            torch.testing.assert_close(pull.columns.double(), expected, rtol=1e-4, atol=0)
        else:
            assert torch.equal(pull.turn, pulls[0][name].turn)
            assert torch.equal(pull.columns, pulls[0][name].columns)


def test_accounts_of_wide_inputs_are_those_of_their_features(tiny_llama):
    method, layer = Elastic(max_width=16), "model.layers.0.mlp.down_proj"
    model = learn(method, tiny_llama, domain(0), lr=LR)
    use = (method.usage.moments[layer] / method.usage.moments[layer].mean()).double()
    before = weights(model)
    after = weights(learn(method, model, domain(1), lr=LR))
    energies = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).double().square().sum(0)
    leak = float((energies * use / (1 + use)).sum() / energies.sum())
    assert method.record()["layers"][layer]["leak"] == pytest.approx(leak, rel=1e-4)
    assert method.record()["layers"][layer]["width"] == 24


def furthest(steps, betas=(0.9, 0.999)):
    """The most |m̂|/√v̂ can be after so many steps, whatever the gradients were (Cauchy-Schwarz)."""
    most = 0.0
    for t in range(1, steps + 1):
        first = [(1 - betas[0]) * betas[0] ** (t - i) / (1 - betas[0] ** t) for i in range(1, t + 1)]
        second = [(1 - betas[1]) * betas[1] ** (t - i) / (1 - betas[1] ** t) for i in range(1, t + 1)]
        most = max(most, sum(a * a / b for a, b in zip(first, second, strict=True)) ** 0.5)
    return most


@pytest.mark.parametrize("strength", [1.0, 100.0, 1e4])
def test_a_domain_goes_no_further_than_each_direction_s_pull_lets_it(tiny_llama, strength):
    """A step of AdamW is at most lr·b; each ends with a division by 1 + lr·κ, so that the sum stays below b/κ."""
    method, steps = Elastic(strength=strength), 20
    model = learn(method, tiny_llama, domain(0), lr=LR)
    before, kept = weights(model), {}

    def note(model):
        kept.update(method.make_optimizer(model, LR).projections)

    after = weights(learn(method, model, domain(1), lr=LR, steps=steps, each_step=note))
    tight = 0
    for name in (*(f"{layer}.weight" for layer in LAYERS), EMBEDDING):
        pull = kept[name]
        turn = pull.turn.double()
        start, change = before[name].double() @ turn, (after[name].double() - before[name].double()) @ turn
        kappa = pull.columns.double() + (0 if pull.rows is None else pull.rows.double())
        bound = furthest(steps) + 0.01 * (start.abs().amax() + change.abs().amax())
        limit = torch.minimum(steps * LR * bound.expand_as(change), bound / kappa) + 1e-6
        assert (change.abs() <= limit).all()
        assert change.norm() > 1e-4
        tight += int((limit < LR * bound).sum())
    assert (tight > 0) == (strength > 1), "a strong pull keeps directions within less than one step"
    assert not torch.equal(before[NORM], after[NORM]), "norms learn on"


def test_the_stronger_the_less_outputs_for_earlier_inputs_change(tiny_llama):
    changes = []
    for strength in (0.0, 10.0, 1000.0):
        method, model = Elastic(strength=strength), copy_of(tiny_llama)
        model = learn(method, model, domain(0), lr=LR)
        moments = {name: method.usage.moments[input_of(name)].double() for name in LAYERS}
        before = weights(model)
        after = weights(learn(method, model, domain(1), lr=LR, steps=10))
        changes.append(0.0)
        for name, moment in moments.items():
            change = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
            changes[-1] += float((change @ moment).mul(change).sum() / moment.trace())
    assert changes[0] > 2 * changes[1] > 2**2 * changes[2]


class Plain(AdamW):
    """AdamW by our own step."""

    def make_optimizer(self, model, lr, path=None):
        return SparseMaskedAdamW(model.named_parameters(), lr=lr)


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
    ("settings", "text"), [({"max_width": 16}, False), ({"strength": 10.0, "text_weight": 2.0}, True)]
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
    assert same(method.usage.moments, other.usage.moments)


def test_a_damaged_file(tiny_llama, tmp_path):
    learn(Elastic(), tiny_llama, domain(0), lr=LR, folder=tmp_path)
    path = tmp_path / "usage.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"usage\.safetensors: not a readable usage file"):
        Elastic().restore(tiny_llama, [tmp_path])


def share_used(matrix, moment, texts):
    """Σ h C² / Σ C² and Σ h with h = (λ/μ)/(1 + λ/μ), in float64, without eigenvectors: h(A) = A (A + μ)⁻¹."""
    matrix, moment = matrix.double(), moment.double()
    mean = moment.trace() / len(moment) / texts
    used = moment @ torch.linalg.inv(moment + mean * torch.eye(len(moment), dtype=torch.float64))
    return float((matrix @ used).mul(matrix).sum() / matrix.square().sum()), float(used.trace())


def test_what_is_reported_is_what_happened(tiny_llama):
    method = Elastic()
    model = learn(method, tiny_llama, domain(0), lr=LR)
    first, moments, before = method.record()["layers"], dict(method.usage.moments), weights(model)
    batches = domain(1, count=6)
    gradients = gradients_of(model, batches[:4])
    after = weights(learn(method, model, batches, lr=LR))
    second = method.record()["layers"]
    assert set(first) == set(second) == set(LAYERS)
    for name in LAYERS:
        weight, moment = f"{name}.weight", moments[input_of(name)]
        width = before[weight].shape[1]
        used = round(share_used(before[weight], moment, 1)[1])
        assert first[name] == {"surviving": 1.0, "leak": None, "width": width, "used": used, "free": width - used}
        taken = share_used(gradients[weight].flatten(0, 1), moment, 1)[0]
        assert second[name]["surviving"] == pytest.approx(1 - taken, abs=1e-5)
        change = after[weight].double() - before[weight].double()
        assert second[name]["leak"] == pytest.approx(share_used(change, moment, 1)[0], rel=1e-3)
        assert second[name]["used"] == round(share_used(change, method.usage.moments[input_of(name)], 2)[1])


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
        ({"token_strength": float("nan")}, "token_strength: expected a number of at least 0, got nan"),
        ({"text_weight": 0.0}, "text_weight: expected a number above 0, got 0.0"),
        ({"text_weight": float("inf")}, "text_weight: expected a number above 0, got inf"),
        ({"max_width": -1}, "max_width: expected a number of at least 0, got -1"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Elastic(**arguments)


def test_settings_are_recorded():
    given = {"strength": 3.0, "token_strength": 0.5, "text_weight": 2.0, "max_width": 99}
    assert Elastic(**given).settings() == given


def test_transposed_weights_are_refused(tiny_llama):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D.*elastic has no account"):
        Elastic().check(transformers.AutoModelForCausalLM.from_config(config))
    Elastic().check(tiny_llama)


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


def test_batches_that_can_be_read_only_once_are_refused(tiny_llama):
    method = Elastic()
    with pytest.raises(ValueError, match="batches: they were empty the second time"):
        method.protect(tiny_llama, iter(domain(0)))
    assert method.usage is None


def test_an_input_that_is_always_zero_has_no_used_direction(tiny_llama):
    method = Elastic()
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight.zero_()
    method.protect(tiny_llama, domain(0))
    basis, use = method.usage.bases["model.layers.0.mlp.down_proj"]
    assert torch.equal(use, torch.zeros(24)) and bool(basis.isfinite().all())
    learn(method, tiny_llama, domain(1), lr=LR)
    assert all(bool(p.isfinite().all()) for p in tiny_llama.parameters())
