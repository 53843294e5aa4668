"""Memory, FLOPs, hours and dollars of a sequence of domains by one method on one kind of device."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sparse_cl.subspace.settings import EXACT_WIDTH

from .activations import PRECISIONS, activation_bytes, logit_bytes
from .demand import WIDE, Demand
from .demands import demand
from .devices import USABLE, Device
from .shapes import ModelShape

_LISTS = ("tracked", "projected", "adapters")
"""What of a demand goes layer by layer; a record leaves it out."""

MOST_DEVICES = 1024
"""More are not looked for when the state is spread over devices."""


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        domains: number of them.
        tokens: that are trained on in a domain, repetitions counted, padding left out.
        batch_size: sequences of a step on a device.
        length: tokens of a sequence.
        precision: one of `PRECISIONS`.
        checkpointing: whether the activations of a block are computed again instead of kept.
        used: share of the input directions that all domains together use, for the methods that protect them.
        probe_records: that one pass of a probe reads of a domain.
        probe_stages: how often everything is probed: 2 is before and after the sequence.
        forward_passes, backward_passes: passes over a domain's records at a stage: forward alone, and forward with
            backward to all weights. The defaults are those of `sparse-cl probe`: forward once for all that is watched,
            once for the loss before steps on each domain and once after each of these (None stands for 2 + domains);
            backward for gradients and for curvature.

    Raises:
        ValueError: a number that is not positive, a share outside [0, 1], or an unknown precision.
    """

    domains: int = 4
    tokens: float = 20e6
    batch_size: int = 8
    length: int = 512
    precision: str = "bf16"
    checkpointing: bool = False
    used: float = 0.4
    probe_records: int = 128
    probe_stages: int = 2
    forward_passes: int | None = None
    backward_passes: int = 2

    def __post_init__(self) -> None:
        for name in ("domains", "tokens", "batch_size", "length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("probe_records", "probe_stages", "forward_passes", "backward_passes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected zero or more, got {getattr(self, name)}")
        if not 0 <= self.used <= 1:
            raise ValueError(f"used: expected a share in [0, 1], got {self.used}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")

        if self.forward_passes is None:
            object.__setattr__(self, "forward_passes", 2 + self.domains)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on one device."""
        return self.batch_size * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes on one device that holds everything.

    Attributes:
        weights: adapters included; with precision "mixed" their bfloat16 copies too.
        bases: of the used directions after the last domain. kept: what else the method keeps in the last domain.
        moments: of what is observed of a domain at its end.
        temporary: of the optimizer's step.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    logits: int
    bases: int
    kept: int
    moments: int
    temporary: int

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the three moments when most is held: gradients grow in the backward pass as activations go."""
        held = self.weights + self.state + self.bases + self.kept
        return {
            "start of the backward pass": held + self.activations + self.logits,
            "optimizer's step": held + self.gradients + self.temporary,
            "observing a domain": held + self.moments,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclass(frozen=True)
class Cost:
    """What one method costs.

    Attributes:
        token_flops: of training, a token; recomputation counted.
        step_flops: of a step, beside its tokens. projection_flops: of a step, in float32, mean over the domains.
        step_seconds: of one step on one device that reaches the assumed share of its peak.
        devices: that must share weights, gradients and state; None: no number does.
        fits: a sentence on that.
        device_hours, dollars: of training. hours: of it by the clock on `devices`.
        probe_flops, probe_device_hours, probe_dollars: of all stages of probing.
    """

    method: str
    demand: Demand
    memory: Memory
    token_flops: float
    step_flops: float
    projection_flops: float
    step_seconds: float
    steps: int
    devices: int | None
    fits: str
    device_hours: float
    hours: float
    dollars: float
    probe_flops: float
    probe_device_hours: float
    probe_dollars: float

    def to_json(self) -> dict[str, Any]:
        asked = {name: value for name, value in asdict(self.demand).items() if name not in _LISTS}
        memory = {**asdict(self.memory), "phases": self.memory.phases, "peak": self.memory.peak}
        return {**asdict(self), "demand": asked, "memory": memory}


def cost(method: str, shape: ModelShape, work: Workload, device: Device, **options: Any) -> Cost:
    """What a sequence of domains costs by one method.

    Args:
        shape: of a model in `weight_dtype(work.precision)`.
        options: as `demand` takes them.

    Raises:
        ValueError: as `demand` does; or sequences longer than the model takes.
    """
    limit = getattr(shape.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and work.length > limit:
        raise ValueError(f"length: expected at most the model's context of {limit} tokens, got {work.length}")
    asked = demand(method, shape, **options)
    memory = _memory(shape, asked, work)
    attention = attention_flops(shape, work.length)
    token = train_flops(shape, asked, work.length, work.checkpointing)
    projection = _projection_flops(asked, work)
    rate = device.utilization * (device.flops_fp32 if work.precision == "fp32" else device.flops)
    # Projections are float32 products in every precision: the bound on their leak needs it.
    projecting = projection / (device.utilization * device.flops_fp32)
    seconds = (work.step_tokens * token + asked.step_flops) / rate + projecting + asked.step_bytes / device.bandwidth
    steps = work.domains * math.ceil(work.tokens / work.step_tokens)
    devices, fits = _devices(shape, asked, memory, device)
    device_hours = steps * seconds / 3600
    forward = 2 * shape.multiplied + attention
    probed = work.probe_stages * work.domains * work.probe_records * work.length
    probe_flops = probed * forward * (work.forward_passes + 3 * work.backward_passes)
    probe_hours = probe_flops / rate / 3600
    return Cost(
        method,
        asked,
        memory,
        token,
        asked.step_flops,
        projection,
        seconds,
        steps,
        devices,
        fits,
        device_hours,
        device_hours / (devices or 1),
        device_hours * device.price,
        probe_flops,
        probe_hours,
        probe_hours * device.price,
    )


def attention_flops(shape: ModelShape, length: int) -> int:
    """FLOPs a token of queries by keys and weights by values, forward; all positions counted, also masked ones."""
    return sum(4 * length * block.queries for block in shape.blocks)


def train_flops(shape: ModelShape, asked: Demand, length: int, checkpointing: bool) -> float:
    """FLOPs a token, forward and backward: 2 for each weight it meets forward, 2 for its input's gradient and 2 for its
    own; attention's products, and twice these backward (Chowdhery et al. 2022, appendix B).
    """
    attention = attention_flops(shape, length)
    total = asked.forward + asked.input_gradients + asked.weight_gradients
    total += attention * (1 + 2 * asked.attention_backward)
    if checkpointing:
        # Computing a block again stops at the last value that is wanted: before the layer out of its neurons.
        spared = next(matrix.size for matrix in shape.matrices if matrix.name == shape.head)
        spared += sum(block.mlp_out.size for block in shape.blocks)
        total += asked.forward - 2 * spared + attention
    return total


def _rank(width: int, asked: Demand, work: Workload, domains: int) -> int:
    """Directions of a layer that so many domains use, each as many as the other."""
    most = asked.settings.get("max_rank")
    share = work.used * width / work.domains
    return min(width, round(domains * (share if most is None else min(share, most))))


def _projection_flops(asked: Demand, work: Workload) -> float:
    total = (work.domains - 1) * asked.turning_flops
    for before in range(work.domains):
        for update in asked.projected:
            # A mask's columns see as many directions of the basis as there are, up to their own number.
            rank = min(update.width, _rank(update.inputs, asked, work, before))
            # The smaller of basis and complement is what is kept.
            total += 4 * update.rows * update.width * min(rank, update.width - rank)
    return total / work.domains


def _memory(shape: ModelShape, asked: Demand, work: Workload) -> Memory:
    bases = moments = 0
    tests: dict[int, int] = {}  # random signs, shared by the layers of a width
    most = asked.settings.get("max_rank")
    for _, width in asked.tracked:
        rank = _rank(width, asked, work, work.domains)
        bases += WIDE * width * min(rank, width - rank)
        columns = width if most is None else most + max(8, most // 8)
        if width <= EXACT_WIDTH or columns >= width:
            moments += WIDE * width * width
        else:
            moments += WIDE * width * columns + 16
            tests[width] = WIDE * width * columns
    tokens = work.step_tokens
    return Memory(
        asked.weight_bytes + (2 * shape.multiplied if work.precision == "mixed" else 0),
        asked.gradient_bytes,
        asked.state_bytes,
        activation_bytes(shape, asked, work.precision, tokens, work.checkpointing) + asked.forward_bytes,
        logit_bytes(shape, work.precision, tokens),
        bases,
        (work.domains > 1) * asked.kept_bytes + (work.domains - 1) * asked.kept_bytes_a_domain,
        moments + sum(tests.values()) + asked.observed_bytes,
        asked.temporary_bytes,
    )


def _devices(shape: ModelShape, asked: Demand, memory: Memory, device: Device) -> tuple[int | None, str]:
    room = USABLE * device.memory
    if memory.peak <= room:
        return 1, "fits one device"
    batch = memory.activations + memory.logits
    # Two of the largest units at a time are whole on every device: the one in use and the next one.
    units = [*(_size(block) for block in shape.blocks), max(matrix.size for matrix in shape.matrices)]
    whole = 2 * shape.itemsize * max(units)
    if batch + whole > room:
        return None, (
            f"does not fit: activations and logits of one batch alone take {batch / 1e9:.1f} of {room / 1e9:.1f} GB; "
            "take a smaller --batch-size or --length, or --checkpointing"
        )
    if not asked.shardable:
        rank = "--max-rank or " if "max_rank" in asked.settings else ""
        return None, (
            f"does not fit one device ({memory.peak / 1e9:.1f} of {room / 1e9:.1f} GB), and bases of directions are "
            f"not spread over several; take a smaller {rank}--batch-size, --checkpointing, or a larger device"
        )
    held = memory.weights + memory.state + memory.kept
    for count in (2**power for power in range(1, MOST_DEVICES.bit_length())):
        step = (held + memory.gradients + memory.temporary) / count
        if whole + max(held / count + batch, step) <= room:
            return count, f"needs {count} devices that share weights, gradients and state (ZeRO-3, FSDP)"
    return None, f"does not fit {MOST_DEVICES} devices"


def _size(block: Any) -> int:
    layers = (*block.attention_into, block.attention_out, *block.mlp_into, block.mlp_out)
    return sum(layer.size for layer in layers)
