"""What is loaded of each method's folder is the model that was trained and scored."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from cases.methods import SHIPPED, copy_of, domain, learn, logits

from sparse_cl.four_domains.sequence import Progress, Scores
from sparse_cl.methods import METHODS
from sparse_cl.report.checkpoints import load_checkpoint

DOMAINS = [domain(seed, count=2) for seed in range(2)]


@pytest.mark.filterwarnings(
    "ignore:.*earlier domains use all but:UserWarning", "ignore:.*gradient survives:UserWarning"
)
@pytest.mark.parametrize("name", [*SHIPPED, "joint", "o-lora"])
def test_a_method_s_folder_gives_the_model_whose_outputs_were_scored(tiny_llama, tmp_path, name):
    base, method, model, seen = copy_of(tiny_llama), METHODS[name](), tiny_llama, []
    for number, batches in enumerate(DOMAINS):
        if method.steps(2, number, len(DOMAINS)):
            folder = tmp_path / name / f"{number + 1}-domain{number}"
            model = learn(method, model, batches, steps=2, folder=folder)
        seen.append(logits(model, DOMAINS[0]))
    progress = Progress([Scores([], None) for _ in range(len(DOMAINS) + 1)])
    (tmp_path / name / "progress.json").write_text(json.dumps(progress.to_json()))
    stages = sorted(path for path in (tmp_path / name).iterdir() if path.is_dir())
    assert len(stages) == (1 if name == "joint" else 2)
    assert torch.equal(seen[0], seen[1]) == (name == "joint")
    for path, expected in [*zip(stages, seen, strict=False), (tmp_path / name, seen[-1])]:
        loaded = load_checkpoint(str(path), copy_of(base))
        assert type(loaded) is transformers.LlamaForCausalLM, "adapters are merged"
        more = set(dict(loaded.named_parameters())) - set(dict(base.named_parameters()))
        branches = {f"model.layers.{i}.mlp.down_proj.columns" for i in range(2)}
        assert more == (branches if name == "routed" else set()), "a branch cannot be merged"
        torch.testing.assert_close(logits(loaded, DOMAINS[0]), expected, rtol=1e-4, atol=1e-5)
