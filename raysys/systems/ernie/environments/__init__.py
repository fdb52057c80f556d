"""Verifiable tasks in text, image, sound and video as gymnasium environments, one question an episode."""

from raysys.systems.ernie.environments.arithmetic import Arithmetic
from raysys.systems.ernie.environments.count import CountDigits
from raysys.systems.ernie.environments.nextframe import NextFrame
from raysys.systems.ernie.environments.question import Question, SingleTurn
from raysys.systems.ernie.environments.registered import ENVIRONMENTS, make, register
from raysys.systems.ernie.environments.tones import Tones

register()

__all__ = [
    "ENVIRONMENTS",
    "Arithmetic",
    "CountDigits",
    "NextFrame",
    "Question",
    "SingleTurn",
    "Tones",
    "make",
    "register",
]
