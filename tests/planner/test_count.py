"""What a dry run counts, against exact numbers and against the method itself on a small model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from cases.methods import SHIPPED

from sparse_cl import ElasticAdamW
from sparse_cl.four_domains.state import optimizer_state_bytes, state_bytes
from sparse_cl.methods import METHODS, AdamW
from sparse_cl.planner import count as counting
from sparse_cl.planner.count import NotPlanned, count
from sparse_cl.planner.dry import DryRun, dry_run
from sparse_cl.planner.model import Workload
from sparse_cl.subspace.subspace import trusted

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names inside peft

BATCH, LENGTH, WIDTH, NEURONS, WORDS = 2, 24, 32, 72, 90
#: Of one block: queries and output, keys and values (half as wide), three matrices of the MLP; and its two norms.
MATRICES = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * NEURONS
BLOCK = MATRICES + 2 * WIDTH


def config(layers=2, **changes):
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


def work(domains=2, **changes):
    given = {"domains": domains, "batch_size": BATCH, "length": LENGTH, "precision": "fp32", "used": 0.5}
    return Workload(**{**given, **changes})


@functools.cache
def counted(name, precision="fp32"):
    """Of two domains of a model of one block, once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        # The search for a threshold takes thousands of small ops, all alike.
        patch.setattr("sparse_cl.subspace.kronecker._HALVINGS", 2, raising=False)
        return count(name, config(1), work(2, precision=precision), **capped(name))


def capped(name):
    """Of methods that keep leading directions, as few as are planned for one of two domains."""
    return {"max_rank": 8} if name.startswith("elastic") else {}


def batch():
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)  # as many rows of the embedding as are planned
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def live(name, of, dtype=torch.float32, **options):
    """A method on a real model, one step into its second domain; the model and the optimizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(of), dtype=dtype)
    method = METHODS[name](**options)
    for number in range(2):
        model = method.before_domain(model, [batch()]).train()
        optimizer = method.make_optimizer(model, 1e-3)
        loss, penalty = model(**batch()).loss, method.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        if number == 0:
            optimizer.zero_grad()
            method.after_domain(model, [batch()])
    return method, model, optimizer


def test_adamw_by_hand():
    parameters = 2 * BLOCK + 2 * WORDS * WIDTH + WIDTH
    found = count("adamw", config(), work(1))
    tensors = 2 * 9 + 3
    assert found["gradients"] == 4 * parameters
    assert found["weights"] == 4 * parameters + 2 * 4 * (WIDTH // 4 // 2), "and two copies of rotary frequencies"
    assert found["state"] == 8 * parameters + 4 * tensors, "two moments, and a count for each tensor"
    assert found["kept"] == 0
    assert count("adamw", config(), work(1, precision="bf16"))["gradients"] == 2 * parameters


def test_flops_are_six_for_each_parameter_and_token_and_attention():
    found = count("adamw", config(), work(1))
    tokens, multiplied = BATCH * LENGTH, 2 * MATRICES + WORDS * WIDTH
    attention = 2 * 4 * LENGTH * WIDTH * tokens
    assert found["forward"] == pytest.approx(2 * multiplied * tokens + attention, rel=1e-3)
    assert found["passes"][0] == pytest.approx(6 * multiplied * tokens + attention * (1 + 5 / 2), rel=1e-3)
    assert found["steps"] == [0]
    again = count("adamw", config(), work(1, checkpointing=True))
    assert again["passes"][0] - found["passes"][0] == pytest.approx(2 * 2 * MATRICES * tokens + attention, rel=0.25)
    assert again["activations"] < found["activations"] / 4
    assert again["peaks"]["backward pass"] < found["peaks"]["backward pass"]


def test_a_corrected_step_moves_what_its_ops_read_and_write():
    """Gradient and moments in, moments and update out, or a plain step; then the update, and the weight both ways.

    One second moment a row is not counted, but the gradient is read once more for it.
    """
    for moment, every, plain in (("entry", 1, 3 + 3), ("entry", 2, 2 + 4), ("row", 1, 3 + 2)):
        run = DryRun(WIDTH, gpu=True)
        with dry_run(run):
            weight = torch.nn.Parameter(torch.empty(1 << 10, 1 << 10))
            weight.grad = torch.empty_like(weight)
            basis = trusted(torch.empty(1 << 10, 1), torch.empty(1), 0.0, 1.0)
            optimizer = ElasticAdamW([weight], memory={weight: basis}, every=every, second_moment=moment)
            optimizer.step()
            run.moved = run.flops = 0
            optimizer.step()
        assert run.moved == pytest.approx((plain + 4) * weight.nbytes, rel=0.02)
        assert run.flops == 2 * 2 * 2**20


def test_adamws_step_moves_what_its_ops_read_and_write():
    """Decay, two moments (lerp; mul and addcmul), the denominator (sqrt, div, add), addcdiv; and a count of steps."""
    run = DryRun(WIDTH, gpu=True)
    with dry_run(run):
        weight = torch.nn.Parameter(torch.empty(1 << 10, 1 << 10))
        weight.grad = torch.empty_like(weight)
        optimizer = torch.optim.AdamW([weight], foreach=True)
        optimizer.step()
        run.moved = 0
        optimizer.step()
    assert run.moved == pytest.approx((2 + 3 + (2 + 4) + (2 + 2 + 2) + 4) * weight.nbytes, abs=100)
    assert run.flops == 0


def test_activations_are_what_the_graph_keeps():
    def saved(layers):
        model = transformers.AutoModelForCausalLM.from_config(config(layers))
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.is_floating_point():
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch(), use_cache=False).loss
        return sum(storage.nbytes() for storage in kept.values()) + 0 * loss.item()

    planned = [count("adamw", config(layers), work(1))["activations"] for layers in (2, 3)]
    assert planned[1] - planned[0] == pytest.approx(saved(3) - saved(2), rel=0.01)


def test_loras_state_is_that_of_its_adapters():
    found = count("lora", config(), work(1), rank=4)
    adapters = 2 * 4 * (2 * 2 * WIDTH + 2 * (WIDTH + WIDTH // 2) + 3 * (WIDTH + NEURONS))
    assert found["gradients"] == 4 * adapters
    assert found["state"] == 8 * adapters + 4 * 2 * 2 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "lora", "sparse-masked", "elastic", "elastic-lora", "ewc", "replay-5"])
def test_state_and_kept_are_those_of_a_live_method(name, dtype):
    method, model, optimizer = live(name, config(1), dtype, **capped(name))
    found = counted(name, "bf16" if dtype == torch.bfloat16 else "fp32")
    assert found["state"] == optimizer_state_bytes(optimizer)
    assert found["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    kept = state_bytes(method, optimizer) - optimizer_state_bytes(optimizer)
    if name == "ewc":  # the last weights and their Fisher information
        kept = sum(p.nbytes + 4 * p.numel() for p in model.parameters())
    if name == "elastic":  # which rows of the embedding are held, and how strongly: no state, 24 bytes each
        kept += 24 * BATCH * LENGTH
    if name == "elastic-lora":  # which holds earlier adapters on the host
        kept -= sum(tensor.nbytes for one in method._adapters._earlier for tensor in one.tensors.values())
    if name != "sparse-masked":  # its account counts booleans and masks, which views of the state share
        # Of a live layer a direction less may explain enough.
        assert found["kept"] == pytest.approx(kept, rel=0.05 if name.startswith("elastic") else 0.01)


@pytest.mark.parametrize("name", ["orthogonal", "orthogonal-lora"])
def test_protected_directions_are_as_many_as_assumed(name):
    found = counted(name)
    _, model, optimizer = live(name, config(1), max_rank=8)
    assert found["state"] == optimizer_state_bytes(optimizer)
    inputs = 4 * [WIDTH] + [NEURONS]  # of q, k and v together, o, gate and up together, the head; and of down
    bases = sum(4 * (width + 1) * round(width / 4) for width in inputs)
    shares = 4 * WORDS
    assert found["kept"] == pytest.approx(bases + shares, rel=0.05)
    assert found["steps"][0] == 0 < found["steps"][1]
    capped = count(name, config(1), work(2), max_rank=2)
    assert capped["kept"] == pytest.approx(sum(4 * (width + 1) * 2 for width in inputs) + shares, rel=0.05)


def test_elastic_makes_two_products_of_low_rank():
    found = counted("elastic")
    wide = 3 * WIDTH**2 + 2 * NEURONS * WIDTH + WORDS * WIDTH
    assert found["steps"] == [0, 2 * 2 * (wide + WIDTH * NEURONS) * 8]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_method_runs_dry(name):
    found = counted(name)
    assert min(found["peaks"].values()) > found["weights"] * 0.99


@pytest.mark.parametrize("name", ["adamw", "lora"])
def test_deep_models_are_counted_from_shallow_ones(name, monkeypatch):
    monkeypatch.setattr(counting, "DEPTHS", (1, 2))
    short = count(name, config(3), work(1))
    monkeypatch.setattr(counting, "DEPTHS", (3, 3))
    whole = count(name, config(3), work(1))
    for key in ("weights", "gradients", "state", "activations", "logits", "forward", "passes", "settings"):
        assert short[key] == whole[key]
    assert short["peaks"] == pytest.approx(whole["peaks"], rel=0.02)


def test_a_method_that_needs_values_is_not_planned(monkeypatch):
    class Looks(AdamW):
        name = "looks"

        def before_domain(self, model, batches):
            raise RuntimeError("a value of 7 was expected\nand more")

    monkeypatch.setitem(METHODS, "looks", Looks)
    with pytest.raises(NotPlanned, match=r"without values \(RuntimeError: a value of 7 was expected\)"):
        count("looks", config(), work(1))


def test_unknown_methods_and_refused_options():
    with pytest.raises(ValueError, match="unknown method 'sgd'; there are adamw, lora"):
        count("sgd", config(), work())
    with pytest.raises(ValueError, match="fraction: expected a share"):
        count("sparse-masked", config(), work(), fraction=2.0)
    with pytest.raises(ValueError, match="length: expected at most the model's context of 64 tokens, got 65"):
        count("adamw", config(), work(length=65))
    transposed = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match="is a Conv1D, .* orthogonal-masked needs torch.nn.Linear"):
        count("orthogonal-masked", transposed, work())


def test_domains_that_are_as_the_one_before_are_not_run(monkeypatch):
    begun, before_domain = [], AdamW.before_domain
    monkeypatch.setattr(AdamW, "before_domain", lambda self, *a: begun.append(self) or before_domain(self, *a))
    found = count("adamw", config(1), work(5))
    assert len(begun) == 2
    assert len(found["moved"]) == len(found["steps"]) == 5


def test_domains_that_add_directions_are_all_run():
    steps = count("orthogonal", config(1), work(4))["steps"]
    assert steps == sorted(set(steps))
