"""How long a collective takes at the rate of the links that its chips share: an estimate that knows no congestion."""

import dataclasses
import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlvr_jax.planning.chips import Chip
from rlvr_jax.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Interconnect:
    """Where the chips of a mesh are.

    Attributes:
      chip: its links.
      place_NC: of each chip, in the order of the mesh, its coordinates in the torus of its slice; [N, 0] without one.
      island_N: which slice or node each chip belongs to.
      extent: size of the torus in each coordinate.
    """

    chip: Chip
    place_NC: np.ndarray
    island_N: np.ndarray
    extent: tuple[int, ...]

    @classmethod
    def of(cls, mesh: Mesh, chip: Chip) -> "Interconnect":
        """Of a mesh of devices, those of a topology's description among them."""
        devices: list[Any] = list(mesh.devices.flat)
        if chip.node:
            number = {device.id: i for i, device in enumerate(sorted(devices, key=lambda device: device.id))}
            island = np.array([number[device.id] // chip.node for device in devices])
            return cls(chip, np.zeros((len(devices), 0), int), island, ())
        place = np.array([getattr(device, "coords", (0, 0, 0)) for device in devices])
        island = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
        return cls(chip, place, island, tuple((place.max(axis=0) + 1).tolist()))

    def seconds(self, x: Collective) -> float:
        """All executions of a collective, one after the other."""
        group = np.array(x.group)
        islands, members = np.unique(self.island_N[group], return_counts=True)
        first = group[self.island_N[group] == islands[0]]
        once = self._inside(x, first) if len(first) > 1 else 0.0
        if len(islands) > 1:
            n, share = len(group), (len(islands) - 1) / len(islands)
            crossing = x.sent if x.kind == "collective-permute" else x.sent / (n - 1) * n * share / int(members.min())
            once = max(once, crossing / self.chip.outside)
        return once * x.times

    def _inside(self, x: Collective, group: np.ndarray) -> float:
        """Within a slice or node: bytes over the links that lead along the group, and the hops."""
        if not self.extent:
            return x.sent / self.chip.link
        if x.kind == "collective-permute":
            return x.sent / self.chip.link + self.chip.hop
        links, longest = 0.0, 1
        for size, column in zip(self.extent, self.place_NC[group].T, strict=True):
            places = np.unique(column)
            if len(places) == 1:
                continue
            step = math.gcd(*np.diff(places).tolist())
            ring = len(places) == size and size % self.chip.wraps == 0
            links += (2 if ring else 1) / step
            longest = max(longest, len(places) // (2 if ring else 1))
        # Everything of an all-to-all travels a quarter of the ring, what is gathered passes every chip once.
        far = max(1.0, longest / 2) if "all-to-all" in x.kind else 1.0
        return far * x.sent / (self.chip.link * max(links, 1.0)) + self.chip.hop * longest
