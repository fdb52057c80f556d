"""What a Byzantine node sends instead. Simulation only: an attack needs the honest vectors in-process."""

from raysys.attacks.registry import ATTACKS, make_attack
from raysys.attacks.simple import alie_z_max
from raysys.attacks.threat import Attack, CustomAttack, PeerView, Threat

__all__ = ["ATTACKS", "Attack", "CustomAttack", "PeerView", "Threat", "alie_z_max", "make_attack"]
