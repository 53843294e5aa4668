"""The README's Python snippets run as they stand, one after the other, as a reader would paste them."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_plain_loop(capsys):
    snippet = next(s for s in SNIPPETS if "optimizer.clip_grad_norm_" in s)
    before, after = snippet.split("for _ in range(10):")
    names: dict = {}
    exec(before, names)
    start = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec("for _ in range(10):" + after, names)
    for name, param in names["model"].named_parameters():
        active = names["masks"][name].to_dense()
        assert torch.equal(param[~active], start[name][~active]), name
        assert (param[active] != start[name][active]).all(), name


def test_the_trainer(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (64, 16))
    names = {
        "model": tiny_llama,
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
    }
    start = {n: p.detach().clone() for n, p in names["model"].named_parameters()}
    exec(next(s for s in SNIPPETS if "Trainer(" in s), names)
    assert names["trainer"].state.global_step == 10
    for name, param in names["model"].named_parameters():
        active = names["masks"][name].to_dense() if name in names["masks"] else torch.zeros(param.shape).bool()
        assert torch.equal(param[~active], start[name][~active]), name
        assert not active.any() or (param[active] != start[name][active]).float().mean() > 0.9, name
