"""Processes and devices that would do the work twice, or behind the methods' backs, are refused."""

from __future__ import annotations

import pytest
import torch

from sparse_cl.models.processes import check_processes


def test_one_process_with_one_device_or_none_is_fine(monkeypatch):
    for devices in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        check_processes()


def test_one_process_that_sees_several_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"sees 2 GPUs; let it see one, CUDA_VISIBLE_DEVICES=0, or .* torchrun"):
        check_processes()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started .*, but accelerate knows of 1"):
        check_processes()
