"""The rows of embeddings that earlier domains look up: the three rules, alone and beside a tied head's directions."""

import copy

import pytest
import torch
from cases.rules import rms
from torch import nn

from sparse_cl import ElasticAdamW, SubspaceMemory, SubspaceProjectedAdamW, protect

V, N, LR, STEPS = 20, 8, 1e-2, 12


class Tied(nn.Module):
    """Looks rows up, and makes logits of them with the same weight."""

    def __init__(self, tied=True, scale=1.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle, self.scale = nn.Embedding(V, N), nn.Linear(N, N, bias=False), scale
        self.head = nn.Linear(N, V, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.to(dtype)

    def forward(self, ids):
        return self.head(torch.tanh(self.middle(self.table(ids) * self.scale)))


def ids(low, high, seed=0, shape=(4, 16)):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def remember(model, *domains, **options):
    memory = SubspaceMemory(model, energy=0.9, source="inputs", max_rank=4, **options)
    for domain in domains:
        with torch.no_grad(), memory.watch():
            model(domain)
        memory.observe()
        memory.consolidate()
    return memory


def train(model, optimizer, steps=STEPS, each=lambda: None):
    for step in range(steps):
        given = ids(0, V, seed=10 + step)
        nn.functional.cross_entropy(model(given).flatten(0, 1), given.flip(1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        each()


def test_shares_of_rows_are_those_of_lookups():
    model, domains = Tied(), (ids(0, 10), ids(5, 15, seed=1))
    rows = remember(model, *domains).used_rows("table.weight")
    expected = sum(torch.bincount(d.flatten(), minlength=V).double() / d.numel() for d in domains)
    assert rows.index.tolist() == expected.nonzero().flatten().tolist()
    torch.testing.assert_close(rows.values.double(), expected[rows.index], rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.usage.double(), expected[rows.index] * len(rows.index), rtol=1e-6, atol=0)


def test_padding_does_not_count():
    model = Tied()
    memory = SubspaceMemory(model, source="inputs")
    given = ids(0, 10)
    mask = torch.ones_like(given)
    mask[:, 10:] = 0
    with torch.no_grad(), memory.watch(mask):
        model(given)
    memory.observe()
    memory.consolidate()
    assert memory.used_rows("table.weight").index.tolist() == given[:, :10].unique().tolist()


def test_shares_fade():
    model = Tied()
    memory = remember(model, ids(0, 10))
    with torch.no_grad(), memory.watch():
        model(ids(10, 20))
    memory.observe()
    memory.consolidate(weight=2.0, fade=0.25)
    values = memory.used_rows("table.weight").values.double()
    assert values[:10].sum() == pytest.approx(0.25) and values[10:].sum() == pytest.approx(2.0)


@pytest.mark.parametrize("outside", [False, True])
def test_an_optimizer_of_embeddings_alone_holds_their_rows(outside):
    """As where Muon has the matrices and AdamW the rest."""
    model = Tied(tied=False)
    memory, before = remember(model, ids(0, 10)), model.table.weight.detach().clone()
    named = [("table.weight", model.table.weight)]
    if outside:
        optimizer = torch.optim.AdamW(named, lr=LR)
        protect(optimizer, memory, budget=0.0)
    else:
        optimizer = ElasticAdamW(named, lr=LR, memory=memory, budget=0.0)
    train(model, optimizer)
    torch.testing.assert_close(model.table.weight[:10], before[:10], rtol=0, atol=1e-12)
    assert (model.table.weight[10:] - before[10:]).abs().max() > LR


def test_what_is_no_lookup_is_left_alone():
    class Positions(nn.Embedding):
        def forward(self, mask):
            return super().forward(mask.cumsum(1) + 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.head = Positions(V, N), nn.Linear(N, N)

        def forward(self, ids):
            return self.head(self.positions(torch.ones_like(ids)))

    model = Model()
    memory = remember(model, ids(0, 10))
    assert memory.used_rows("positions.weight") is None
    optimizer = ElasticAdamW(model.named_parameters(), memory=memory)
    assert "positions.weight" in optimizer.rest
    model(ids(0, 10)).square().mean().backward()
    with pytest.warns(UserWarning, match="trained unprotected, as it never saw .*: 'positions.weight'"):
        optimizer.step()


def test_an_empty_batch_and_a_computed_lookup_drop_no_rows():
    model = Tied()
    memory = remember(model, ids(0, 10))
    for input_ids in (ids(0, 10)[:, :0], ids(10, 20)):
        with torch.no_grad(), memory.watch():
            model.table(input_ids)
            model(ids(10, 20))
        memory.observe()
    memory.consolidate()
    assert len(memory.used_rows("table.weight").index) == 20
    model.table.forward = lambda ids: nn.Embedding.forward(model.table, ids.flip(1))
    with torch.no_grad(), memory.watch():
        model(ids(15, 18))
    memory.observe()
    memory.consolidate()
    assert len(memory.used_rows("table.weight").index) == 20, "what it looked up is not known, and the old rows stay"


def test_rows_that_are_scaled_count():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * N**0.5

    model = Tied()
    model.table = Scaled(V, N, _weight=model.head.weight.detach().clone()).double()
    assert len(remember(model, ids(0, 10)).used_rows("table.weight").index) == 10


@pytest.mark.parametrize("form", ["file", "copy"])
def test_rows_survive(form, tmp_path):
    model = Tied()
    memory = remember(model, ids(0, 10))
    with torch.no_grad(), memory.watch():
        model(ids(3, 8))
    memory.observe()
    if form == "file":
        memory.save(tmp_path / "memory.safetensors")
        twin = SubspaceMemory.load(tmp_path / "memory.safetensors", model)
    else:
        twin = copy.deepcopy(memory)
    for each in (memory, twin):
        each.consolidate()
    ours, theirs = (each.used_rows("table.weight") for each in (memory, twin))
    assert torch.equal(ours.index, theirs.index) and torch.equal(ours.values, theirs.values)


def oracle(model, memory, rule, number, share):
    """One step's correction of an embedding that is no head, written out."""
    rows, start = memory.used_rows("table.weight"), model.table.weight.detach().clone()
    size = rms(start)
    held = float(rows.values.double() @ start[rows.index].square().sum(1))

    def correct(weight, lr):
        moved = (weight - start)[rows.index]
        values = rows.values.double()
        if rule == "pull":
            moved = moved / (1 + lr * number / size * share * rows.usage.double())[:, None]
        else:
            low, high = 0.0, 1e12
            for _ in range(300):
                middle = (low + high) / 2
                left = moved / (1 + middle * values)[:, None]
                low, high = (low, middle) if values @ left.square().sum(1) <= number * held else (middle, high)
            moved = moved if values @ moved.square().sum(1) <= number * held else moved / (1 + high * values)[:, None]
        found = weight.clone()
        found[rows.index] = start[rows.index] + moved
        return found

    return correct


@pytest.mark.parametrize("kind", ["fused", "hook"])
@pytest.mark.parametrize(("rule", "number"), [("pull", 200.0), ("budget", 1e-4)])
def test_rows_of_an_untied_embedding_equal_the_oracle(kind, rule, number):
    model = Tied(tied=False)
    twin = copy.deepcopy(model)
    memory = remember(model, ids(0, 10), ids(5, 12, seed=1))
    given = {"strength": number} if rule == "pull" else {"budget": number}
    # Only the table has gradients, so that the oracle needs nothing but AdamW.
    named = [("table.weight", model.table.weight), ("middle.weight", model.middle.weight)]
    if kind == "fused":
        optimizer = ElasticAdamW(named, lr=LR, memory=memory, row_strength=0.5, **given, second_moment="entry")
    else:
        optimizer = torch.optim.AdamW(named, lr=LR)
        protection = protect(optimizer, memory, row_strength=0.5, **given)
    theirs = torch.optim.AdamW([twin.table.weight], lr=LR, weight_decay=optimizer.param_groups[0]["weight_decay"])
    correct = oracle(twin, memory, rule, number, 0.5)

    for step in range(STEPS):
        for each, opt in ((model, optimizer), (twin, theirs)):
            gradient = torch.randn(V, N, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            each.table.weight.grad = gradient + 1
            opt.step()
        with torch.no_grad():
            twin.table.weight.copy_(correct(twin.table.weight.detach(), LR))
        torch.testing.assert_close(model.table.weight, twin.table.weight, rtol=1e-7, atol=1e-9)
    drift = (optimizer if kind == "fused" else protection).old_output_drift()
    assert drift["table.weight"] > 0 and drift.get("middle.weight", 0.0) < 1e-20
    if rule == "budget":
        assert drift["table.weight"] <= number * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [{"strength": 100.0}, {"budget": 1e-4}])
@pytest.mark.parametrize("every", [1, 3])
def test_a_tied_head_keeps_both_bounds_and_the_hook_equals_the_optimizer(dtype, given, every):
    model, twin = (Tied(dtype=dtype) for _ in range(2))
    drifts = []
    for each in (model, twin):
        memory = remember(each, ids(0, 10))
        if each is model:
            named = each.named_parameters()
            optimizer = ElasticAdamW(
                named, lr=LR, weight_decay=0.1, memory=memory, every=every, **given, second_moment="entry"
            )
            account = optimizer
        else:
            optimizer = torch.optim.AdamW(each.named_parameters(), lr=LR, weight_decay=0.1)
            account = protect(optimizer, memory, every=every, **given)
        found = []
        train(each, optimizer, each=lambda account=account, found=found: found.append(account.old_output_drift()))
        drifts.append(found)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-4, atol=1e-5)
    assert set(drifts[0][0]) == {"table.weight", "table.weight (rows)", "middle.weight"}
    for step, (ours, theirs) in enumerate(zip(*drifts, strict=True), 1):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-9)
        if "budget" in given and step % every == 0:
            assert max(ours.values()) <= given["budget"] * (1 + 1e-5)


def test_a_budget_holds_on_bf16_masters():
    """Energies of bfloat16 rows are summed in float32: in their own dtype the budget would be off by 1e-3."""
    model, budget = Tied(tied=False, dtype=torch.bfloat16), 1e-4
    memory = remember(model, ids(0, 10))
    rows, weight = memory.used_rows("table.weight"), model.table.weight
    start = weight.detach().double()[rows.index]
    optimizer = ElasticAdamW(model.named_parameters(), lr=LR, memory=memory, budget=budget)
    spent = []

    def look():
        moved = optimizer.state[weight]["master"].double().view(V, N)[rows.index] - start
        held = rows.values.double() @ start.square().sum(1)
        spent.append(float(rows.values.double() @ moved.square().sum(1) / held))

    train(model, optimizer, each=look)
    assert 0.99 * budget < max(spent) <= budget * (1 + 1e-5)


def test_hard_freezes_used_rows_alone():
    model = Tied(tied=False)
    memory = remember(model, ids(0, 10))
    before = model.table.weight.detach().clone()
    train(model, SubspaceProjectedAdamW(model.named_parameters(), lr=LR, memory=memory, rest="train"))
    moved = (model.table.weight != before).any(1)
    assert not moved[:10].any() and moved[10:].all()


def test_a_checkpoint_goes_on_with_the_same_bits():
    ends = []
    for stop in (None, 5):
        model = Tied(dtype=torch.float32)
        memory = remember(model, ids(0, 10))

        def make(model=model, memory=memory):
            return ElasticAdamW(model.named_parameters(), lr=LR, memory=memory, strength=30.0)

        optimizer = make()
        for step in range(STEPS):
            if step == stop:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make()
                optimizer.load_state_dict(state)
            given = ids(0, V, seed=10 + step)
            nn.functional.cross_entropy(model(given).flatten(0, 1), given.flip(1).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.table.weight.detach().clone())
    assert torch.equal(*ends)


def test_a_mask_on_a_protected_embedding_is_refused():
    from sparse_cl import RowMask

    model = Tied(tied=False)
    memory = remember(model, ids(0, 10))
    masks = {"table.weight": RowMask(range(4), (V, N))}
    with pytest.raises(ValueError, match=r"table.weight.*RowMask.*row_strength=0"):
        ElasticAdamW(model.named_parameters(), memory=memory, masks=masks)
    ElasticAdamW(model.named_parameters(), memory=memory, masks=masks, row_strength=0)
