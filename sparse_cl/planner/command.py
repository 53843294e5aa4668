"""`sparse-cl plan`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_cl.arguments import names, positive
from sparse_cl.methods import METHODS

from .devices import CUSTOM, DEVICES, find_device
from .model import Workload

_METHOD = ("rank", "fraction", "max_rank")
_DEVICE = {
    "tflops": "peak in the precision of the plan, 1e12 FLOP/s",
    "bandwidth": "of its memory, GB/s",
    "memory": "GB",
    "price": "dollars an hour",
    "mfu": "share of the peak that is reached, recomputation counted as work",
}


def _count(text: str) -> float:
    """A number, with k, M or G after it for a thousand, a million, a billion."""
    scale = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number such as 20M, got {text!r}")
    return value * scale


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `plan` to the commands of `sparse-cl`."""
    parser = commands.add_parser(
        "plan",
        help="what a sequence of domains would cost: memory, FLOPs, hours, dollars",
        description="Print the memory, FLOPs, hours and dollars of a sequence of domains and of probing it, from "
        "stated assumptions. Nothing is trained, and no weights are loaded.",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--model", required=True, metavar="CONFIG", help="folder with a config.json, that file, or a name on the Hub")
    kinds = "NAME[,NAME…]|all|ours|baselines|bounds"
    add("--method", default="all", metavar=kinds, help=f"of {', '.join(METHODS)}{default}")
    add("--gpu", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} or {CUSTOM}{default}")
    add("--json", type=Path, metavar="FILE", help="write everything to a file as well")
    types = {"tokens": _count, "precision": str, "used": float, "domains": positive}
    types |= {"batch_size": positive, "length": positive}
    for field in fields(Workload):
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.default is False:
            add(flag, action="store_true", help=help)
        else:
            add(flag, type=types.get(field.name, int), default=field.default, help=help + default)
    add = parser.add_argument_group("settings of methods (default: each method's own)").add_argument
    add("--rank", type=positive, help="of the adapters")
    add("--fraction", type=float, help="of the neurons that a domain may change")
    add("--max-rank", type=positive, help="most directions that a domain adds to a layer's basis")
    add = parser.add_argument_group("the device (default: what is known of it)").add_argument
    for name, text in _DEVICE.items():
        add(f"--{name}", type=float, help=text)
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in _DEVICE}
    device = find_device(arguments.gpu, utilization=given.pop("mfu"), **given)
    # transformers takes seconds to import: not for --help or a mistyped option.
    from sparse_cl.four_domains.files import write_json
    from sparse_cl.four_domains.settings import methods_named
    from sparse_cl.models.loading import quiet

    from .cost import cost
    from .count import NotPlanned, count
    from .model import build, read_config
    from .table import plan_text

    quiet()
    methods = methods_named(names(arguments.method))
    work = Workload(**{field.name: getattr(arguments, field.name) for field in fields(Workload)})
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"--json {arguments.json}: its folder does not exist; make it first")
    taken = _choose(methods, {name: getattr(arguments, name) for name in _METHOD})
    config = read_config(arguments.model)
    model = build(config, arguments.model, work.precision)
    costs: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for method in methods:
        try:
            counted = count(method, config, work, name=arguments.model, **taken[method])
            costs[method] = cost(model, counted, work, device)
        except NotPlanned as error:
            refused[method] = str(error)
    print(plan_text(arguments.model, model, work, device, costs, refused))
    if arguments.json is not None:
        facts = {"name": arguments.model, "parameters": sum(p.numel() for p in model.parameters())}
        plan = {"model": facts, "device": vars(device), "run": vars(work), "methods": costs, "not_planned": refused}
        write_json(arguments.json, plan)


def _choose(methods: Sequence[str], options: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
    """For each method those of the options that are given and that it takes."""
    if not methods:
        raise ValueError(f"--method: expected {', '.join(METHODS)}, or all; got none")
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}: expected {', '.join(METHODS)}, or all")
    taken = {name: inspect.signature(METHODS[name].__init__).parameters for name in methods}
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if not any(option in parameters for parameters in taken.values()):
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} is set, but no method of this plan takes it: {', '.join(methods)}. Leave it out")
    return {name: {o: value for o, value in given.items() if o in parameters} for name, parameters in taken.items()}
