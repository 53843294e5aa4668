"""Dense to 2:4: which weights are locked, what that keeps, and what it does not."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import copy_of, domain, gradients_of, learn, logits, same, weights

from sparse_cl.masks import TwoFourMask
from sparse_cl.methods import TwoFour
from sparse_cl.methods.two_four import TRACKS
from sparse_cl.probes.fisher import diagonal_fisher
from sparse_cl.probes.two_four import one_of_four_masks, only_two_four, two_four_masks

LR = 3e-3
DOWN = "model.layers.1.mlp.down_proj.weight"


def best_two(scores, count=2):
    """Of each four along a row the two largest, one group at a time."""
    dense = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for start in range(0, len(row), 4):
            for j in sorted(range(start, start + 4), key=lambda j: -row[j])[:count]:
                dense[i, j] = True
    return dense


def loss_by_hand(model, batches, zeroed=()):
    """Nats a token of the predicted tokens that have a label, with the free weights of `zeroed` at zero."""
    plain = copy_of(model)
    with torch.no_grad():
        for name, mask in dict(zeroed).items():
            plain.get_parameter(name).mul_(mask.to_dense())
        total = count = 0
        for batch in batches:
            out = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            targets = batch["labels"][:, 1:]
            chances = out[:, :-1].double().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
            total, count = total - chances[targets >= 0].sum(), count + int((targets >= 0).sum())
    return float(total / count)


def wanda_by_hand(model, batches):
    """|W_ij| ‖x_j‖ of the layer DOWN."""
    seen = []
    layer = model.get_submodule(DOWN.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    logits(model, batches)
    handle.remove()
    counted = batches[0]["attention_mask"].bool()
    counted[:, 0] = False
    return layer.weight.detach().double().abs() * torch.cat([x[counted] for x in seen]).square().sum(0).sqrt()


def test_wanda_s_two_of_four_and_one_of_the_others(tiny_llama):
    masks = two_four_masks(tiny_llama, domain(0))
    assert len(masks) == 14
    assert torch.equal(masks[DOWN].to_dense(), best_two(wanda_by_hand(tiny_llama, domain(0))))
    ones = one_of_four_masks(tiny_llama, domain(1), masks)
    others = wanda_by_hand(tiny_llama, domain(1)).masked_fill(masks[DOWN].to_dense(), -1)
    assert torch.equal(ones[DOWN].to_dense(), best_two(others, 1))
    assert not (ones[DOWN] & masks[DOWN]).numel


def test_fisher_s_two_of_four(tiny_llama):
    masks = two_four_masks(tiny_llama, domain(0), "fisher")
    weight = tiny_llama.get_parameter(DOWN)
    fisher = diagonal_fisher(tiny_llama, domain(0), {DOWN: weight})
    # The other layers' labels are drawn alike.
    assert torch.equal(masks[DOWN].to_dense(), best_two(fisher[DOWN] * weight.detach().square()))


def test_of_equal_weights_the_first_are_locked(tiny_llama):
    with torch.no_grad():
        tiny_llama.get_parameter(DOWN).zero_()
    dense = two_four_masks(tiny_llama, domain(0))[DOWN].to_dense()
    assert torch.equal(dense.view(-1, 4), torch.tensor([True, True, False, False]).expand(dense.numel() // 4, 4))


@pytest.mark.filterwarnings("ignore:two-four. this domain takes the last track")
@pytest.mark.parametrize("score", ["wanda", "fisher"])
@pytest.mark.parametrize("text", [False, True])
def test_locked_tracks_are_locked_for_good_and_compute_the_same(tiny_llama, score, text):
    method, model = TwoFour(score), tiny_llama
    if text:
        method.protect(model, domain(4))
    ends, first = [], []
    for number in range(TRACKS - text):
        before = weights(model)
        model = learn(method, model, domain(number), lr=LR)
        after, locked = weights(model), [track for track in method.tracks]
        assert len(locked) == number + 1 + text
        for name in before:
            moved = before[name] != after[name]
            if len(locked) == 1:
                assert moved.any()
            elif name in locked[-1]:
                own = locked[-1][name].to_dense()
                assert not moved[~own].any(), "only the domain's own track is written"
                assert moved[own].float().mean() > 0.9
            else:
                assert not moved.any()
        ends.append(after)
        with only_two_four(model, locked[0]):
            first.append(logits(model, domain(4 if text else 0)))
    assert all(torch.equal(logits, first[0]) for logits in first), "no forgetting, at the price of the conversion"
    for name in method.tracks[0]:
        counts = [track[name].to_dense().view(-1, 4).sum(1).unique().tolist() for track in method.tracks]
        assert counts == [[2], [1], [1]]
        assert method.locked[name].to_dense().all(), "the tracks are disjoint, and all of it"
        for track, end in zip(method.tracks[text:], ends, strict=True):
            own = track[name].to_dense()
            assert torch.equal(model.get_parameter(name)[own], end[name][own]), "bit-identical since its domain"


def test_a_domain_without_a_track_is_told_and_not_trained(tiny_llama):
    method, model = TwoFour(), tiny_llama
    assert [method.steps(9, number, 5) for number in range(5)] == [9, 9, 9, 0, 0]
    assert [method.steps(9, number, 4, protected=True) for number in range(4)] == [9, 9, 0, 0]
    for number in range(2):
        model = learn(method, model, domain(number), lr=LR)
        assert all(layer["free"] == layer["width"] * (2 - number) // 4 for layer in method.record()["layers"].values())
    with pytest.warns(UserWarning, match="this domain takes the last track; a further one finds none"):
        model = learn(method, model, domain(2), lr=LR)
    assert all(layer["free"] == 0 for layer in method.record()["layers"].values())
    state, opened = weights(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="two-four: no track is left; of each four weights, two were locked"):
        learn(method, model, domain(3), lr=LR)
    assert same(state, weights(model))
    assert opened == [p.requires_grad for p in model.parameters()]


def test_the_first_domain_trains_everything_unless_a_text_is_protected(tiny_llama):
    other = copy_of(tiny_llama)
    before = weights(tiny_llama)
    after = weights(learn(TwoFour(), tiny_llama, domain(0), lr=LR))
    assert all(not torch.equal(before[name], after[name]) for name in before)

    method = TwoFour()
    method.protect(other, domain(3))
    expected = two_four_masks(other, domain(3))
    after = weights(learn(method, other, domain(0), lr=LR))
    assert method.tracks[0] == expected
    for name in before:
        frozen = expected[name].to_dense() if name in expected else torch.ones_like(before[name], dtype=torch.bool)
        assert torch.equal(before[name][frozen], after[name][frozen])
    assert not torch.equal(before[DOWN], after[DOWN])


def test_what_conversion_costs(tiny_llama):
    method, losses = TwoFour(), []
    base = copy_of(tiny_llama)
    model = learn(method, tiny_llama, domain(0, count=6), lr=LR)
    batches = domain(0, count=6)
    first = method.record()["conversion"]
    trial = two_four_masks(base, batches)
    losses = [(first["before"], base, trial), (first["after"], copy_of(model), method.locked)]
    start = copy_of(model)
    model = learn(method, model, domain(1), lr=LR)
    second = method.record()["conversion"]
    for given, then, masks in losses:
        assert given["dense"] == pytest.approx(loss_by_hand(then, batches[:4]), rel=1e-5)
        assert given["locked"] == pytest.approx(loss_by_hand(then, batches[:4], masks), rel=1e-5)
        assert given["locked"] != pytest.approx(given["dense"], rel=1e-3)
    assert second["before"]["dense"] == pytest.approx(loss_by_hand(start, domain(1)[:4]), rel=1e-5)
    assert second["after"]["dense"] == pytest.approx(loss_by_hand(model, domain(1)[:4]), rel=1e-5)
    assert second["after"]["locked"] == second["before"]["locked"]


def test_the_capacity_account_is_that_of_a_recount(tiny_llama):
    method = TwoFour()
    model = learn(method, tiny_llama, domain(0), lr=LR)
    first = method.record()["layers"]
    gradients = gradients_of(model, domain(1)[:4])
    learn(method, model, domain(1), lr=LR)
    second = method.record()["layers"]
    assert set(first) == set(second) == set(method.tracks[0])
    for name, mask in method.tracks[1].items():
        own, gradient = mask.to_dense(), gradients[name].double()
        surviving = float(gradient[:, own].square().sum() / gradient.square().sum())
        counts = {"width": own.numel(), "used": own.numel() // 2, "free": own.numel() // 2}
        assert first[name] == {"surviving": 1.0, "leak": None, **counts}
        counts = {"width": own.numel(), "used": 3 * own.numel() // 4, "free": own.numel() // 4}
        assert second[name] == {"surviving": pytest.approx(surviving, rel=1e-6), "leak": 0.0, **counts}


def test_a_resumed_run_goes_on_with_the_same_bits(tiny_llama, tmp_path):
    base, method, model = copy_of(tiny_llama), TwoFour(), tiny_llama
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        model = learn(method, model, domain(number), lr=LR, folder=folder)
    other = TwoFour()
    resumed = other.restore(base, folders)
    with pytest.warns(UserWarning, match="takes the last track"):
        model = learn(method, model, domain(2), lr=LR)
    with pytest.warns(UserWarning, match="takes the last track"):
        resumed = learn(other, resumed, domain(2), lr=LR)
    assert same(weights(model), weights(resumed))
    assert method.tracks == other.tracks
    assert method.record() == other.record()


def test_only_two_four_gives_the_parameters_back(tiny_llama):
    masks = two_four_masks(tiny_llama, domain(0))
    own = dict(tiny_llama.named_parameters())
    with pytest.raises(KeyError), only_two_four(tiny_llama, masks):
        assert tiny_llama.get_parameter(DOWN) is not own[DOWN]
        raise KeyError
    assert all(p is own[name] for name, p in tiny_llama.named_parameters())

    layer, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    mask = TwoFourMask(best_two(layer[0].weight.detach().abs()))
    with torch.no_grad(), only_two_four(layer, {"0.weight": mask}):
        found = layer(x)
    expected = x @ (layer[0].weight * mask.to_dense()).T + layer[0].bias
    torch.testing.assert_close(found, expected.detach())
    for wrong, message in (
        ({"0.bias": mask}, "'0.bias' is not the weight of a torch.nn.Linear"),
        ({"0.weight": TwoFourMask(best_two(torch.ones(2, 8)))}, r"'0.weight' is \(4, 8\), but its mask is \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=message), only_two_four(layer, wrong):
            pass
    with (
        pytest.raises(ValueError, match=r"0\.weight is torch\.float32; the sparse kernels take float16"),
        only_two_four(layer, {"0.weight": mask}, semi_structured=True),
    ):
        pass
    weight = layer.half()[0].weight
    with (
        pytest.raises(ValueError, match=r"0\.weight of shape \(4, 8\) on cpu cannot be compressed"),
        only_two_four(layer, {"0.weight": mask}, semi_structured=True),
    ):
        pass
    assert layer[0].weight is weight


def test_models_that_have_no_two_of_four(tiny_llama):
    narrow = transformers.LlamaConfig(**{**tiny_llama.config.to_dict(), "intermediate_size": 22})
    model = transformers.LlamaForCausalLM(narrow)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj has 22 inputs, where 2:4 needs a multiple"):
        TwoFour().check(model)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        TwoFour().check(transformers.AutoModelForCausalLM.from_config(config))
    TwoFour().check(tiny_llama)
    with pytest.raises(ValueError, match="score: expected 'wanda' or 'fisher', got 'size'"):
        TwoFour("size")
    with pytest.raises(ValueError, match="score: expected one of wanda, fisher, got 'size'"):
        two_four_masks(tiny_llama, domain(0), "size")


def test_measuring_changes_no_mode_and_leaves_no_gradient(tiny_llama):
    method = TwoFour("fisher")
    tiny_llama.train()
    state = weights(tiny_llama)
    method.before_domain(tiny_llama, domain(0))
    method.after_domain(tiny_llama, domain(0))
    method.before_domain(tiny_llama, domain(1))
    assert tiny_llama.training
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert same(state, weights(tiny_llama))


def test_what_was_frozen_stays_so_and_the_rest_is_open_afterwards(tiny_llama):
    name, method = "model.layers.0.mlp.up_proj.weight", TwoFour()
    tiny_llama.get_parameter(name).requires_grad_(False)
    before = tiny_llama.get_parameter(name).detach().clone()
    for number in range(2):
        learn(method, tiny_llama, domain(number), lr=LR)
        assert [n for n, p in tiny_llama.named_parameters() if not p.requires_grad] == [name]
    assert torch.equal(tiny_llama.get_parameter(name), before)
