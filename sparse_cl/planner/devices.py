"""The accelerators that the planner knows, and what is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Share of a device's memory that tensors may take: the rest is the driver's, the libraries' and lost between blocks.
USABLE = 0.92
#: Devices of one machine.
MACHINE = 8


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as `--gpu` takes it.
        flops, flops_fp32: peak of dense bfloat16 products, and of float32 products without TF32, FLOP/s.
        bandwidth, memory: bytes/s, bytes.
        link: bytes/s that it sends to the others of its machine, of which there are `MACHINE`.
        network: bytes/s that all network cards of its machine send, one for each device.
        price: dollars an hour; an assumption: on-demand offers of 2025 differ by a factor of three.
        utilization: share of the peak that products of matrices reach, recomputation counted as work; all other ops
            take the time that their bytes take at `bandwidth`. An assumption: of whole steps PaLM reports 0.46
            (Chowdhery et al. 2022, table 3), Llama 3 0.38 to 0.43 (Dubey et al. 2024, table 4), both after much tuning.
        source: of the numbers up to `memory`. links: of `link` and `network`.
    """

    name: str
    flops: float
    flops_fp32: float
    bandwidth: float
    memory: float
    link: float
    network: float
    price: float
    utilization: float
    source: str
    links: str

    def between(self, count: int) -> float:
        """Bytes/s that each of `count` devices passes on around a ring, which crosses machines by all their cards.

        Raises:
            ValueError: it is not known.
        """
        if self.link == 0:
            raise ValueError(f"--gpus {count}: how fast {self.name} devices send to each other is unknown; give --link")
        return self.link if count <= MACHINE else min(self.link, self.network)


_A100 = "NVIDIA A100 Tensor Core GPU data sheet, SXM"
_DGX = "NVIDIA DGX {} data sheet: NVLink 900 GB/s in both directions, eight network cards of 400 Gb/s"
_DGX_A100 = "NVIDIA DGX A100 data sheet: NVLink 600 GB/s in both directions, eight network cards of 200 Gb/s"
_HOPPER = "NVIDIA {} Tensor Core GPU data sheet, SXM"
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 312e12, 19.5e12, 1555e9, 40e9, 300e9, 200e9, 1.3, 0.4, _A100 + " 40 GB", _DGX_A100),
        Device("a100", 312e12, 19.5e12, 2039e9, 80e9, 300e9, 200e9, 1.8, 0.4, _A100 + " 80 GB", _DGX_A100),
        Device(
            "h100",
            989.4e12,
            66.9e12,
            3350e9,
            80e9,
            450e9,
            400e9,
            3.0,
            0.35,
            _HOPPER.format("H100"),
            _DGX.format("H100"),
        ),
        Device(
            "h200",
            989.4e12,
            66.9e12,
            4800e9,
            141e9,
            450e9,
            400e9,
            3.8,
            0.35,
            _HOPPER.format("H200"),
            _DGX.format("H200"),
        ),
    )
}
OTHER = "custom"
#: What may be given of a device: the fields that it sets, and its unit.
FLAGS = {
    "tflops": (("flops", "flops_fp32"), 1e12),
    "bandwidth": (("bandwidth",), 1e9),
    "memory": (("memory",), 1e9),
    "link": (("link", "network"), 1e9),
    "price": (("price",), 1),
    "mfu": (("utilization",), 1),
}


def find_device(name: str, **given: float) -> Device:
    """A known device with the given numbers in the place of its own, or one that is all given ("custom").

    Args:
        given: of `FLAGS`. tflops: peak in 1e12 FLOP/s in the precision that is planned for. bandwidth: GB/s (1e9
            bytes). memory: GB (1e9 bytes). link: GB/s to other
            devices, wherever they are. price: dollars an hour. mfu: in (0, 1].

    Raises:
        ValueError: an unknown name, a number that is not positive, or a custom device without all that it needs.
    """
    for flag, value in given.items():
        if not (0 < value < float("inf") or (flag == "price" and value == 0)):
            raise ValueError(f"--{flag}: expected a positive number, got {value:g}")
    if given.get("mfu", 1) > 1:
        raise ValueError(f"--mfu: expected a share in (0, 1], got {given['mfu']:g}")
    if name == OTHER:
        if missing := [f"--{flag}" for flag in FLAGS if flag not in given and flag not in ("mfu", "link")]:
            raise ValueError(f"--gpu {OTHER} needs {', '.join(missing)} too: nothing is known of it")
    elif name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: expected {', '.join(DEVICES)}, or {OTHER} with its numbers")
    device = DEVICES.get(name) or Device(OTHER, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, "given", "given")
    changes = {field: value * FLAGS[flag][1] for flag, value in given.items() for field in FLAGS[flag][0]}
    return replace(device, **changes)  # type: ignore[arg-type]
