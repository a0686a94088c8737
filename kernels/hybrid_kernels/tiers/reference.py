"""What splitting a token's active neurons by tier means, and the cache's policy, as plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid_kernels.tiers.layout import DISK, GPU, MOST_ASKED


@dataclass(slots=True)
class Slot:
    """One bundle's place. owner: (network, neuron), None: empty."""

    owner: tuple[int, int] | None = None
    asked: int = 0
    last_used: int = 0


@dataclass(slots=True)
class NeuronCache:
    """Keeps what is asked for often and was lately: a clock whose hand takes one from every slot's count it passes.

    A slot is given away when its count is 0. What the present layer uses stays. The result follows from what was asked
    for, in which order, and from nothing else.
    """

    num_slots: int
    slots: list[Slot] = field(init=False)
    place_of: dict[tuple[int, int], int] = field(default_factory=dict)
    hand: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        """All slots are empty."""
        self.slots = [Slot() for _ in range(self.num_slots)]

    def begin_layer(self) -> None:
        """From now on, what earlier layers used may go."""
        self.epoch += 1

    def ask(self, neuron: tuple[int, int]) -> bool:
        """Whether it is there; if not it is from now on. There must be more slots than a layer asks for."""
        place = self.place_of.get(neuron)
        if place is not None:
            slot = self.slots[place]
            slot.asked, slot.last_used = min(MOST_ASKED, slot.asked + 1), self.epoch
            return True
        place = self._free_place()
        slot = self.slots[place]
        if slot.owner is not None:
            del self.place_of[slot.owner]
        self.place_of[neuron] = place
        slot.owner, slot.asked, slot.last_used = neuron, 1, self.epoch
        return False

    def _free_place(self) -> int:
        while True:
            place, self.hand = self.hand, (self.hand + 1) % self.num_slots
            slot = self.slots[place]
            if slot.last_used == self.epoch:
                continue
            if slot.owner is None or slot.asked == 0:
                return place
            slot.asked -= 1


@dataclass(frozen=True, slots=True)
class Split:
    """Active neurons of one network, ascending, by where they are computed. missing: those to be read first."""

    hot: list[int]
    cold: list[int]
    missing: list[int]


def split_neurons(active: Sequence[int], tiers: Sequence[int], network: int, cache: NeuronCache) -> Split:
    """active: ascending; tiers: by neuron."""
    hot = [neuron for neuron in active if tiers[neuron] == GPU]
    cold = [neuron for neuron in active if tiers[neuron] != GPU]
    missing = [neuron for neuron in cold if tiers[neuron] == DISK and not cache.ask((network, neuron))]
    return Split(hot, cold, missing)
