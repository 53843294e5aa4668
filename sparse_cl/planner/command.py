"""`sparse-cl plan`."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from sparse_cl.arguments import add_options, chosen, names, option
from sparse_cl.methods import METHODS, method_named

from .devices import DEVICES, FLAGS, OTHER, find_device
from .model import Workload

_OF_METHODS: dict[str, Any] = {"group": "settings of methods (default: each method's own)"}
_OF_DEVICE: dict[str, Any] = {"group": "the device (default: what is known of it)"}


@dataclass(frozen=True, kw_only=True)
class _Plan(Workload):
    """The options of `sparse-cl plan`."""

    model: str = option(MISSING, "folder with a config.json, that file, or a name on the Hub", metavar="CONFIG")
    method: str = option("all", f"of {', '.join(METHODS)}", metavar="NAME[,NAME…]|all|ours|baselines|bounds")
    gpu: str = option("h100", f"{', '.join(DEVICES)} or {OTHER}", metavar="NAME")
    gpus: tuple[int, ...] = option((1,), "over how many FSDP2 splits the model; each trains on batches of its own")
    json: Path | None = option(None, "write everything to a file as well", metavar="FILE")
    rank: int | None = option(None, "of the adapters", least=1, **_OF_METHODS)
    fraction: float | None = option(None, "of the neurons that a domain may change", **_OF_METHODS)
    max_rank: int | None = option(None, "most directions that are kept of a layer", least=1, **_OF_METHODS)
    tflops: float | None = option(None, "peak in the precision of the plan, 1e12 FLOP/s", **_OF_DEVICE)
    bandwidth: float | None = option(None, "of its memory, GB/s", **_OF_DEVICE)
    memory: float | None = option(None, "GB", **_OF_DEVICE)
    link: float | None = option(None, "of a device to the others, GB/s", **_OF_DEVICE)
    price: float | None = option(None, "dollars an hour", **_OF_DEVICE)
    mfu: float | None = option(
        None, "share of the peak that products of matrices reach, recomputation counted as work", **_OF_DEVICE
    )

    def given(self, names: Any) -> dict[str, Any]:
        """Those of the options of these names that are set."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `plan` to the commands of `sparse-cl`."""
    parser = commands.add_parser(
        "plan",
        help="what a sequence of domains would cost: memory, FLOPs, hours, dollars",
        description="Print the memory, FLOPs, hours and dollars of a sequence of domains and of probing it, from "
        "stated assumptions. Nothing is trained, and no weights are loaded.",
    )
    add_options(parser, _Plan)
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    plan = chosen(_Plan, arguments)
    device = find_device(plan.gpu, **plan.given(FLAGS))
    if not plan.gpus or min(plan.gpus) < 1:
        raise ValueError(f"--gpus: expected numbers of at least 1 such as 1,8,64, got {','.join(map(str, plan.gpus))}")
    for gpus in plan.gpus:
        if gpus > 1:
            device.between(gpus)
    # transformers takes seconds to import: not for --help or a mistyped option.
    from sparse_cl.four_domains.files import write_json
    from sparse_cl.four_domains.settings import methods_named
    from sparse_cl.models.loading import quiet

    from .cost import cost
    from .count import NotPlanned, count
    from .model import build, read_config
    from .table import plan_text

    quiet()
    if plan.json is not None and not plan.json.resolve().parent.is_dir():
        raise ValueError(f"--json {plan.json}: its folder does not exist; make it first")
    options = _options(plan, methods_named(names(plan.method)))
    config = read_config(plan.model)
    model = build(config, plan.model, plan.precision)
    costs: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for (method, taken), gpus in product(options.items(), dict.fromkeys(plan.gpus)):
        shown = method if plan.gpus == (1,) else f"{method} on {gpus}"
        try:
            counted = count(method, config, plan, name=plan.model, gpus=gpus, **taken)
            costs[shown] = cost(model, counted, plan, device, gpus)
        except NotPlanned as error:
            refused[shown] = str(error)
    print(plan_text(plan.model, model, plan, device, costs, refused))
    if plan.json is not None:
        facts = {"name": plan.model, "parameters": sum(p.numel() for p in model.parameters())}
        run = {field.name: getattr(plan, field.name) for field in fields(Workload)}
        found = {"model": facts, "device": vars(device), "run": run, "methods": costs, "not_planned": refused}
        write_json(plan.json, found)


def _options(plan: _Plan, methods: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """For each method those of the options that are given and that it takes."""
    if not methods:
        raise ValueError(f"--method: expected {', '.join(METHODS)}, or all; got none")
    taken = {name: method_named(name, "all").options for name in methods}
    given = plan.given(("rank", "fraction", "max_rank"))
    for name in given:
        if not any(name in options for options in taken.values()):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is set, but no method of this plan takes it: {', '.join(methods)}. Leave it out")
    return {method: {o: value for o, value in given.items() if o in options} for method, options in taken.items()}
