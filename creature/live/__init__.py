"""A creature that lives: senses in, emissions out, one tick of 80 ms after another."""

from creature.live.creature import LiveCreature
from creature.live.emission import Emission
from sampling_creature import Sampling

__all__ = ["Emission", "LiveCreature", "Sampling"]
