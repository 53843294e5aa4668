"""Bad input to a memory is named, and leaves it as it was."""

import pytest
import torch
from cases.subspace import gradients, observe_all, weight, with_gap
from torch import nn

from sparse_cl import SubspaceMemory


def trained(n=16, rows=8):
    model = nn.Sequential(nn.Linear(n, rows), nn.ReLU(), nn.Linear(rows, n))
    for name, param in model.named_parameters():
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 0.0}, r"energy: expected a share in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, "energy: expected a share"),
        ({"energy": float("nan")}, "energy: expected a share"),
        ({"max_rank": 0}, "max_rank: expected at least 1, or None"),
        ({"max_rank": 17}, r"max_rank: expected at most the width of the widest layer, 16 \(0.weight\), got 17"),
        ({"max_rank": "most"}, "max_rank: expected a number, 'auto', or None for no cap, got 'most'"),
        ({"oversample": -1}, "oversample: expected at least 0"),
        ({"source": "activations"}, "source: expected one of gradients, inputs, got 'activations'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SubspaceMemory(trained(), **settings)


def test_nothing_to_track():
    with pytest.raises(ValueError, match="LayerNorm has no torch.nn.Linear; its layers with parameters are LayerNorm"):
        SubspaceMemory(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="no parameter has two dimensions"):
        SubspaceMemory([("bias", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(TypeError, match=r"expected a module or \(name, parameter\) pairs, got Parameter"):
        SubspaceMemory(trained().parameters())
    with pytest.raises(ValueError, match='source="inputs" needs the model'):
        SubspaceMemory(trained().named_parameters(), source="inputs")


def test_complex_layers_are_refused():
    with pytest.raises(TypeError, match="1.weight is torch.complex64; expected real weights"):
        SubspaceMemory(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.cfloat)), source="inputs")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("width", [16, 1100])
def test_an_observation_that_is_not_finite_is_refused_whole(bad, width):
    model = trained(width)
    memory = SubspaceMemory(model, max_rank=4)
    memory.observe()
    held = {n: {k: t.clone() for k, t in la.moment.tensors().items()} for n, la in memory._layers.items()}
    good = model[2].weight.grad.clone()
    model[2].weight.grad[3, 1] = bad
    with pytest.raises(ValueError, match="the gradient of '2.weight' holds NaN or infinity, so nothing was observed"):
        memory.observe()
    for name, layer in memory._layers.items():
        assert all(torch.equal(tensor, held[name][key]) for key, tensor in layer.moment.tensors().items())
    model[2].weight.grad = good
    memory.observe()
    assert all(rank > 0 for rank in memory.consolidate().values())


def test_an_input_that_is_not_finite_is_refused_whole():
    model = trained()
    memory = SubspaceMemory(model, energy=1.0, source="inputs")
    x = torch.randn(5, 16)
    x[2, 3] = torch.nan
    with memory.watch():
        model(x)
    with pytest.raises(ValueError, match="the input of '0.weight' holds NaN or infinity"):
        memory.observe()
    with pytest.raises(ValueError, match="nothing was observed"):
        memory.consolidate()
    with memory.watch():
        model(x.nan_to_num())
    memory.observe()
    assert memory.consolidate()["0.weight"] == 5


def test_out_of_order():
    model = nn.Linear(4, 4)
    memory = SubspaceMemory(model)
    with pytest.raises(ValueError, match=r"consolidate: nothing was observed; call observe\(\) in the domain first"):
        memory.consolidate()
    with pytest.raises(ValueError, match="observe: no tracked weight has a gradient; call it after backward"):
        memory.observe()
    with (
        pytest.raises(ValueError, match='watch: the memory\'s source is "gradients"; build it with source="inputs"'),
        memory.watch(),
    ):
        pass
    watching = SubspaceMemory(model, source="inputs")
    with pytest.raises(ValueError, match="no forward pass was noted since the last call; run the model with gradients"):
        watching.observe()
    assert (memory.domains, memory.rank("weight")) == (0, 0)


def test_a_forward_pass_that_fails_is_not_hidden_by_the_memory():
    model = trained()
    memory = SubspaceMemory(model, source="inputs")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied .5x3 and 16x8"), memory.watch():
        model(torch.randn(5, 3))
    model(torch.randn(5, 16))
    with pytest.raises(ValueError, match="no forward pass was noted"):
        memory.observe()


def test_unknown_weights():
    memory = SubspaceMemory(trained())
    for ask in (memory.rank, memory.basis, memory.subspace):
        with pytest.raises(KeyError, match="does not track '1.weight'; the first it tracks are 0.weight, 2.weight"):
            ask("1.weight")
        with pytest.raises(KeyError, match=r"does not track a parameter of shape \(3,\)"):
            ask(torch.zeros(3))


def test_leak_of_other_weights():
    model = trained()
    memory = SubspaceMemory(model)
    with pytest.raises(ValueError, match="after: has no weight '2.weight', which the memory tracks"):
        memory.leak(model, {"0.weight": model[0].weight})
    with pytest.raises(ValueError, match=r"before: '0.weight' is \(16, 8\), expected \(8, 16\)"):
        memory.leak({"0.weight": model[0].weight.mT, "2.weight": model[2].weight}, model)


def test_a_memory_of_another_model(tmp_path):
    memory = SubspaceMemory(trained())
    memory.observe()
    memory.consolidate()
    memory.save(tmp_path / "memory.safetensors")
    other = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    with pytest.raises(ValueError, match="tracks '2.weight', which the model does not have; .* this one"):
        SubspaceMemory.load(tmp_path / "memory.safetensors", other)
    wider = trained(24)
    with pytest.raises(ValueError, match=r"tracks '0.weight' of shape \(8, 16\), but the model has \(8, 24\)"):
        memory.bind(wider)
    assert memory.tracks(next(iter(memory._layers.values())).param)


def test_a_memory_that_is_bound_to_no_model_cannot_watch(tmp_path):
    model = trained()
    SubspaceMemory(model, energy=1.0, source="inputs").save(tmp_path / "memory.safetensors")
    loaded = SubspaceMemory.load(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match=r"bound to no model; call memory.bind\(model\) first"), loaded.watch():
        pass
    loaded.bind(model)
    with loaded.watch():
        model(torch.randn(3, 16))
    loaded.observe()
    assert loaded.consolidate()["0.weight"] == 3


def test_files_that_are_no_memories(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "memory.safetensors"
    param = weight(8, 24)
    memory = SubspaceMemory([("w", param)])
    observe_all(memory, param, gradients(with_gap(24, 4), 8, 1))
    memory.consolidate()
    memory.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable memory file"):
        SubspaceMemory.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no memory of sparse_cl; expected a file"):
        SubspaceMemory.load(path)
    path.write_bytes(whole)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    for name, damaged, message in (
        ("w:basis", 2 * tensors["w:basis"], "not orthonormal"),
        ("w:values", -tensors["w:values"], "values: expected .* numbers of at least 0"),
        ("w:values", tensors["w:values"][1:], "values: expected"),
    ):
        save_file(tensors | {name: damaged}, path, metadata=header)
        with pytest.raises(ValueError, match=f"the memory is damaged .*{message}"):
            SubspaceMemory.load(path)
    del tensors["w:values"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=r"the memory is damaged \('w:values'\); write it again"):
        SubspaceMemory.load(path)
    with pytest.raises(FileNotFoundError):
        SubspaceMemory.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "settings of version 1, but this sparse_cl reads 3; observe the earlier domains again"),
        (2, "settings of version 2, but this sparse_cl reads 3; observe the earlier domains again"),
        (4, "settings of version 4, but this sparse_cl reads 3; install the sparse_cl that wrote it"),
    ],
)
def test_versions_of_files(tmp_path, version, message):
    """Versions 1, which had no number of its own, and 2 did not know how much a direction is used."""
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path, model = tmp_path / "memory.safetensors", trained()
    memory = SubspaceMemory(model, max_rank=6, energy=0.9, seed=2)
    memory.observe()
    memory.consolidate()
    memory.save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    settings = json.loads(header["settings"])
    assert settings == {
        "version": 3,
        "max_rank": 6,
        "energy": 0.9,
        "source": "gradients",
        "oversample": None,
        "seed": 2,
        "share_inputs": True,
        "domains": 1,
        "tables": {},
    }
    other = {key: value for key, value in settings.items() if key != "version"} | (
        {"version": version} if version else {}
    )
    save_file(load_file(path), path, metadata=header | {"settings": json.dumps(other)})
    with pytest.raises(ValueError, match=message):
        SubspaceMemory.load(path, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0.0}, "weight: expected a number above 0, got 0.0"),
        ({"weight": float("nan")}, "weight: expected a number above 0, got nan"),
        ({"weight": float("inf")}, "weight: expected a number above 0, got inf"),
        ({"fade": -0.1}, r"fade: expected a number in \[0, 1\], got -0.1"),
        ({"fade": 1.1}, "fade: expected a number in"),
        ({"fade": float("nan")}, "fade: expected a number in"),
    ],
)
def test_weights_of_domains_out_of_range(arguments, message):
    memory = SubspaceMemory(trained())
    memory.observe()
    with pytest.raises(ValueError, match=message):
        memory.consolidate(**arguments)
    assert (memory.domains, memory.rank("0.weight")) == (0, 0)
    assert memory.consolidate()["0.weight"] > 0


def test_a_factorization_that_fails_leaves_the_domain_open(monkeypatch):
    from sparse_cl.subspace import consolidation as module

    memory = SubspaceMemory(trained())
    memory.observe()
    works, calls = module.leading, []

    def fails_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return works(*args)

    monkeypatch.setattr(module, "leading", fails_second)
    with pytest.raises(torch.linalg.LinAlgError):
        memory.consolidate()
    assert (memory.domains, [memory.rank(name) for name in memory.names]) == (0, [0, 0])
    monkeypatch.undo()
    assert all(rank > 0 for rank in memory.consolidate().values())
