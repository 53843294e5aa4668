"""`sparse-cl plan`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_cl.arguments import names, positive
from sparse_cl.methods import METHODS

from .devices import CUSTOM, DEVICES, find_device


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
    parser.add_argument(
        "--model", required=True, metavar="CONFIG", help="folder with a config.json, that file, or a name on the Hub"
    )
    parser.add_argument("--domains", type=positive, default=4, help="how many (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=_count, default=20e6, metavar="N", help="trained on in a domain: 20000000 or 20M (the default)"
    )
    parser.add_argument(
        "--method",
        default="all",
        metavar="NAME[,NAME…]|all|ours|baselines|bounds",
        help=f"of {', '.join(METHODS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} or {CUSTOM} (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences a step (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=512, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument(
        "--precision",
        default="bf16",
        metavar="NAME",
        help="bf16; mixed: float32 weights, products in bfloat16; fp32 (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again instead of keeping them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file as well")
    method = parser.add_argument_group("settings of methods (default: each method's own)")
    method.add_argument("--rank", type=positive, help="of the adapters")
    method.add_argument("--fraction", type=float, help="of the neurons that a domain may change")
    method.add_argument("--max-rank", type=positive, help="most directions that a domain adds to a layer's basis")
    method.add_argument(
        "--used", type=float, default=0.4, help="share of directions that all domains use (default: %(default)s)"
    )
    device = parser.add_argument_group("the device (default: what is known of it)")
    device.add_argument("--tflops", type=float, help="peak in the precision of the plan, 1e12 FLOP/s")
    device.add_argument("--bandwidth", type=float, help="of its memory, GB/s")
    device.add_argument("--memory", type=float, help="GB")
    device.add_argument("--price", type=float, help="dollars an hour")
    device.add_argument("--mfu", type=float, help="share of the peak that is reached, recomputation counted as work")
    probing = parser.add_argument_group("probing")
    probing.add_argument("--probe-records", type=int, default=128, help="of each domain (default: %(default)s)")
    probing.add_argument("--probe-stages", type=int, default=2, help="2: before and after (default: %(default)s)")
    probing.add_argument("--forward-passes", type=int, help="at a stage (default: 2 and one a domain)")
    probing.add_argument("--backward-passes", type=int, default=2, help="at a stage (default: %(default)s)")
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    device = find_device(
        arguments.gpu,
        tflops=arguments.tflops,
        bandwidth=arguments.bandwidth,
        memory=arguments.memory,
        price=arguments.price,
        utilization=arguments.mfu,
    )
    # transformers takes seconds to import: not for --help or a mistyped option.
    from sparse_cl.four_domains.files import write_json
    from sparse_cl.four_domains.settings import methods_named
    from sparse_cl.models.loading import quiet

    from .activations import weight_dtype
    from .cost import Workload, cost
    from .shapes import read_config, shape_of_config
    from .table import plan_text

    quiet()
    options = {name: getattr(arguments, name) for name in ("rank", "fraction", "max_rank")}
    methods = methods_named(names(arguments.method))
    work = Workload(
        domains=arguments.domains,
        tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        length=arguments.length,
        precision=arguments.precision,
        checkpointing=arguments.checkpointing,
        used=arguments.used,
        probe_records=arguments.probe_records,
        probe_stages=arguments.probe_stages,
        forward_passes=arguments.forward_passes,
        backward_passes=arguments.backward_passes,
    )
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"--json {arguments.json}: its folder does not exist; make it first")
    taken = _choose(methods, options)
    shape = shape_of_config(read_config(arguments.model), arguments.model, weight_dtype(work.precision))
    costs = [cost(name, shape, work, device, **taken[name]) for name in methods]
    print(plan_text(shape, work, device, costs))
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "model": {
                    "name": shape.name,
                    "parameters": shape.parameters,
                    "multiplied": shape.multiplied,
                    "blocks": len(shape.blocks),
                },
                "device": vars(device),
                "run": vars(work),
                "methods": {entry.method: entry.to_json() for entry in costs},
            },
        )


def _choose(methods: Sequence[str], options: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
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
    return {
        name: {option: value for option, value in given.items() if option in parameters}
        for name, parameters in taken.items()
    }
