"""Lightning's Trainer with the callback: protected, resumed with the same bits, clipped by active entries."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, logits, same, weights
from cases.trainers import records
from torch.utils.data import DataLoader

from sparse_cl import ElasticAdamW, RowMask, SparseMaskedAdamW
from sparse_cl.methods import Elastic, load_carried

lightning = pytest.importorskip("lightning")


class Module(lightning.LightningModule):
    def __init__(self, model, make=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2)):
        super().__init__()
        self.model, self.make, self.norms = model, make, []

    def training_step(self, batch, number):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return self.make(self.model)

    def configure_gradient_clipping(self, *args, **kwargs):
        super().configure_gradient_clipping(*args, **kwargs)
        active = [p.grad[::20].norm() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(active).norm()))


def loader_of(seed):
    def collate(items):
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    return DataLoader(records(seed), batch_size=4, collate_fn=collate)


# Of four batches an epoch: Lightning goes on from the end of one.
def fit(module, seed, folder, callback, checkpoint=None, steps=8, **options):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[callback, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, loader_of(seed), ckpt_path=checkpoint, weights_only=False)
    return trainer


def test_a_second_domain_is_protected_and_goes_on_from_a_checkpoint(tiny_llama, tmp_path):
    from sparse_cl.integrations import ContinualLightning

    fit(Module(tiny_llama), 0, tmp_path / "0", ContinualLightning(Elastic(), folder=tmp_path / "0"))
    assert load_carried(tmp_path / "0", tiny_llama).memory.domains == 1
    before, moved, ends = logits(tiny_llama, domain(0)), [], []
    for strength, resumes in ((5.0, False), (5.0, True), (0.0, False)):
        model = copy_of(tiny_llama)
        callback = ContinualLightning(Elastic(strength=strength), memory=tmp_path / "0", folder=tmp_path / "1")
        paths = sorted((tmp_path / "5.0").glob("*step=4.ckpt")) if resumes else [None]
        fit(Module(model), 1, tmp_path / str(strength), callback, paths[0])
        moved.append(float((logits(model, domain(0)) - before).norm()))
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert moved[0] < 0.8 * moved[2]
    assert load_carried(tmp_path / "1").memory.domains == 2
    fit(Module(model), 0, tmp_path / "2", callback)  # which has its memory by now
    assert callback.carried.memory.domains == 3


def test_a_domain_that_accumulates_gradients_goes_on(tiny_llama, tmp_path):
    from sparse_cl.integrations import ContinualLightning

    fit(Module(tiny_llama), 0, tmp_path / "0", ContinualLightning(Elastic(), folder=tmp_path / "0"))
    ends = []
    for resumes in (False, True):
        model = copy_of(tiny_llama)
        paths = sorted((tmp_path / "False").glob("*step=4.ckpt")) if resumes else [None]
        callback = ContinualLightning(Elastic(), memory=tmp_path / "0")
        fit(Module(model), 1, tmp_path / str(resumes), callback, paths[0], accumulate_grad_batches=2)
        ends.append(weights(model))
    assert same(*ends)


def test_a_domain_that_is_resumed_without_its_memory_is_refused(tiny_llama, tmp_path):
    from sparse_cl.integrations import ContinualLightning

    fit(Module(tiny_llama), 0, tmp_path / "0", ContinualLightning(Elastic(), folder=tmp_path / "0"))
    later = ContinualLightning(Elastic(), memory=tmp_path / "0")
    fit(Module(copy_of(tiny_llama)), 1, tmp_path / "1", later)
    (checkpoint,) = (tmp_path / "1").glob("*step=4.ckpt")
    with pytest.raises(ValueError, match="memory: expected the one that the domain began with"):
        fit(Module(tiny_llama), 1, tmp_path / "2", ContinualLightning(Elastic()), checkpoint)


def test_our_own_optimizer_goes_on_with_the_same_bits(tiny_llama, tmp_path):
    from sparse_cl.integrations import ContinualLightning

    def make(model):
        return ElasticAdamW(model.named_parameters(), lr=1e-2)

    fit(Module(tiny_llama, make), 0, tmp_path / "0", ContinualLightning(Elastic(), folder=tmp_path / "0"))
    ends = []
    for resumes in (False, True):
        model = copy_of(tiny_llama)
        paths = sorted((tmp_path / "False").glob("*step=4.ckpt")) if resumes else [None]
        callback = ContinualLightning(Elastic(), memory=tmp_path / "0")
        fit(Module(model, make), 1, tmp_path / str(resumes), callback, paths[0])
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_counts_active_entries_alone(tiny_llama, tmp_path, precision):
    from sparse_cl.integrations import ContinualLightning

    masks = {n: RowMask(range(0, p.shape[0], 20), p.shape) for n, p in tiny_llama.named_parameters() if "_proj" in n}
    for name, p in tiny_llama.named_parameters():
        p.requires_grad_(name in masks)

    def make(model):
        return SparseMaskedAdamW(model.named_parameters(), lr=1e-4, masks=masks)

    module = Module(tiny_llama, make)
    fit(module, 0, tmp_path, ContinualLightning(Elastic()), steps=1, gradient_clip_val=1e-3, precision=precision)
    assert module.norms[0] == pytest.approx(1e-3, rel=1e-2)
