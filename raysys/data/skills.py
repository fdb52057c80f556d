"""A household robot in symbols: what it is asked, which skill comes next, and when a skill can be done at all.

    query     "just done: open the fridge; asked: the crunchy fruit should be kept cold; before: go to the fridge"
    document  "find the apple"

Notable choices
- Skills are worded as in SayCan's plans (arXiv 2204.01691); instructions name neither objects nor places, they describe them. So
  the match is partly meaning (which object) and partly the state of the work (which step), which the query tells as steps so far.
- The world is exact: a skill has preconditions (`refusal`), and what cannot be done changes nothing. Opening needs a free
  gripper, so a fridge is opened before the thing is fetched; what lies in a closed container is out of reach.
- Where a thing lies at first is always the same and not told: it is learned, or `find` leads to it.
- An errand has one plan here, so each query has one right document. Some objects are withheld from
  training with all their skills and instructions (`unseen`); half of the test queries are about those.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raysys.data.datasets import DataError
from raysys.data.plans import progress, read_plans
from raysys.data.rationales import Asked, Generated, check
from raysys.runtime.seeds import Seeds, Stream

# object: where it lies at first, and words for it
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "apple": ("counter", ("the crunchy fruit", "the round red fruit")),
    "banana": ("counter", ("the long yellow fruit", "the fruit that monkeys like")),
    "milk": ("fridge", ("what cows give", "the white stuff for cereal")),
    "cheese": ("fridge", ("what mice love", "the dairy slice for a sandwich")),
    "coke can": ("fridge", ("the fizzy brown drink", "the sugary cola")),
    "water bottle": ("table", ("something plain against thirst", "what one drinks after running")),
    "sponge": ("sink", ("the soft thing for scrubbing", "what soaks up a spill")),
    "mug": ("cupboard", ("what coffee is served in", "the vessel for hot tea")),
    "plate": ("cupboard", ("the flat dish", "what a meal is served on")),
    "spoon": ("drawer", ("the cutlery for soup", "what one stirs sugar with")),
    "knife": ("drawer", ("the sharp blade", "what bread is cut with")),
    "scissors": ("drawer", ("what paper is cut with", "the pair of blades for cutting hair")),
    "newspaper": ("table", ("the daily press", "the printed headlines")),
    "phone": ("desk", ("the device for calls", "what rings when someone dials")),
    "laptop": ("desk", ("the portable computer", "the machine for typing mails")),
    "chips": ("table", ("the salty snack", "the crisps")),
}
CONTAINERS = ("fridge", "cupboard", "drawer")
USER = "you"
# place: how an instruction says that a thing {O} should get there
PLACES: dict[str, tuple[str, ...]] = {
    "table": ("{O} belongs where we eat", "set out {O} for dinner"),
    "counter": ("{O} goes on the worktop", "leave {O} where we chop vegetables"),
    "sink": ("{O} needs a rinse", "let {O} wait for washing up"),
    "desk": ("i need {O} for my homework", "{O} should be where i work"),
    "trash": ("get rid of {O}", "{O} is garbage now"),
    "fridge": ("{O} should be kept cold", "cool {O} down"),
    "cupboard": ("store {O} with the crockery", "{O} goes behind the kitchen doors"),
    "drawer": ("stow {O} with the cutlery", "{O} must slide out of sight"),
    USER: ("hand me {O}", "i would love {O} right now"),
}
ARTICLE = r"(?:the |an |a )?"
VERBS = {
    "find": re.compile(f"find {ARTICLE}(.+)"),
    "pick": re.compile(f"pick up {ARTICLE}(.+)"),
    "put": re.compile(f"put down {ARTICLE}(.+)"),
    "go": re.compile(f"go to {ARTICLE}(.+)"),
    "bring": re.compile(r"bring it to (you)"),
    "open": re.compile(f"open {ARTICLE}(.+)"),
    "close": re.compile(f"close {ARTICLE}(.+)"),
    "done": re.compile(r"(done)\b.*"),
}


@dataclass(frozen=True)
class Skill:
    """What the robot can be told: a text and what it means."""

    text: str
    verb: str
    what: str

    @classmethod
    def of(cls, text: str) -> Skill:
        """The skill of a text in SayCan's wording.

        Raises:
            ValueError: the text is none.
        """
        for verb, pattern in VERBS.items():
            if match := pattern.fullmatch(text):
                return cls(text, verb, match[1])
        raise ValueError(
            f"skill: got {text!r}; expected find, pick up, put down, go to, bring it to you, open, close or done"
        )


@dataclass
class World:
    """Where everything is. Without `places` (SayCan's plans tell none) only the gripper and the doors count."""

    where: dict[str, str] = field(default_factory=dict)
    places: bool = True
    at: str = ""
    holding: str = ""
    opened: set[str] = field(default_factory=set)
    finished: bool = False

    def refusal(self, skill: Skill) -> str:
        """Why the skill cannot be done now, in words; empty if it can."""
        what = skill.what
        shut = self.places and self.at in CONTAINERS and self.at not in self.opened
        match skill.verb:
            case "find" if what == self.holding:
                return f"the gripper holds the {what}"
            case "find" if self.places and what not in self.where:
                return f"there is no {what}"
            case "go" if self.places and what == self.at:
                return f"the robot is at the {what}"
            case "pick" if self.holding:
                return f"the gripper holds the {self.holding}"
            case "open" | "close" if self.places and self.holding:
                return f"the gripper holds the {self.holding}"
            case "put" if self.holding != what:
                return f"the gripper does not hold the {what}"
            case "bring" if not self.holding:
                return "the gripper holds nothing"
            case "pick" if self.places and self.where.get(what) != self.at:
                return f"the {what} is not here"
            case "pick" | "put" if shut:
                return f"the {self.at} is closed"
            case "open" | "close" if self.places and what != self.at:
                return f"the robot is not at the {what}"
            case "open" if what in self.opened:
                return f"the {what} is open"
            case "close" if what not in self.opened:
                return f"the {what} is closed"
        return ""

    def do(self, skill: Skill) -> None:
        """Carry out a skill.

        Raises:
            ValueError: it cannot be done now.
        """
        if reason := self.refusal(skill):
            raise ValueError(f"skill: got {skill.text!r}; {reason}")
        match skill.verb:
            case "find":
                self.at = self.where.get(skill.what, f"where the {skill.what} is")
            case "go" | "bring":
                self.at = skill.what
            case "pick":
                self.holding = skill.what
                self.where[skill.what] = "gripper"
            case "put":
                self.where[skill.what], self.holding = self.at, ""
            case "open":
                self.opened.add(skill.what)
            case "close":
                self.opened.remove(skill.what)
            case "done":
                self.finished = True


@dataclass(frozen=True)
class Errand:
    """An instruction and what it means: objects and the place where each is to be, in this order; or a plan that shows it."""

    text: str
    goals: tuple[tuple[str, str], ...]
    shown: tuple[str, ...] = ()

    def start(self) -> World:
        """The world before it."""
        return World({thing: home for thing, (home, _) in OBJECTS.items()}) if not self.shown else World(places=False)

    def met(self, world: World) -> bool:
        """Whether every object is where it should be; of a plan that shows it, whether the world is what the plan makes of it."""
        if not self.shown:
            return all(world.where.get(thing) == place for thing, place in self.goals)
        end = self.start()
        for text in self.shown:
            end.do(Skill.of(text))
        return (world.where, world.holding, world.at, world.opened) == (end.where, end.holding, end.at, end.opened)

    def plan(self) -> list[str]:
        """The skills that carry it out: of each goal, open where the thing goes, fetch it, put it down; then done."""
        world, steps = self.start(), list(self.shown)

        def do(text: str) -> None:
            world.do(Skill.of(text))
            steps.append(text)

        for thing, place in self.goals:
            if place in CONTAINERS and place not in world.opened:
                if world.at != place:
                    do(f"go to the {place}")
                do(f"open the {place}")
            do(f"find the {thing}")
            if world.at in CONTAINERS and world.at not in world.opened:
                do(f"open the {world.at}")
            do(f"pick up the {thing}")
            do("bring it to you" if place == USER else f"go to the {place}")
            do(f"put down the {thing}")
        return steps if self.shown else [*steps, "done"]


def pool() -> tuple[str, ...]:
    """The texts of all skills, in a fixed order without meaning."""
    places = [f"go to the {place}" for place in PLACES if place != USER]
    doors = [f"{verb} the {box}" for box in CONTAINERS for verb in ("open", "close")]
    things = [f"{verb} the {thing}" for thing in OBJECTS for verb in ("find", "pick up", "put down")]
    return tuple(sorted([*places, *doors, *things, "bring it to you", "done"]))


def draw_errand(rng: np.random.Generator, things: Sequence[str]) -> Errand:
    """One or, in a third of the cases, two of the objects are to be moved from where they lie at first."""
    chosen = rng.permutation(np.array(things))[: 2 if len(things) > 1 and rng.integers(3) == 0 else 1]
    goals, said = [], []
    for thing in map(str, chosen):
        place = str(rng.choice([place for place in PLACES if place != OBJECTS[thing][0]]))
        goals.append((thing, place))
        said.append(str(rng.choice(PLACES[place])).format(O=rng.choice(OBJECTS[thing][1])))
    return Errand(", and then ".join(said), tuple(goals))


def shown_errands(file: Path) -> list[Errand]:
    """SayCan's instructions, each with the plan that shows what it means.

    Raises:
        DataError: a line is no plan, a step is no skill, or a step cannot be done after those before it.
    """
    errands = []
    for line, instruction, steps in read_plans(file):
        errand = Errand(instruction, (), tuple(steps))
        try:
            errand.met(World())
        except ValueError as e:
            raise DataError(f"data: {file} line {line}: {e}") from None
        errands.append(errand)
    return errands


@dataclass(frozen=True)
class Skills:
    """How many steps of errands there are, and how many objects training does not know."""

    train: int = 1200
    test: int = 400
    unseen: float = 0.125
    """Share of the objects withheld from training with their skills, in [0, 0.5]."""
    seed: int = 0

    def __post_init__(self) -> None:
        check("skills", self.unseen, 0.0, self.train, self.test, self.seed)

    def things(self) -> tuple[list[str], list[str]]:
        """The objects of training, and those withheld from it."""
        order = [str(t) for t in Seeds(self.seed).rng(Stream.INIT, node=0).permutation(sorted(OBJECTS))]
        cut = round(self.unseen * len(order))
        return order[cut:], order[:cut]

    def errands(self, part: str) -> list[Errand]:
        """Errands, all different, with at least as many steps as the part, `train` or `test`, has queries.

        Half of the steps of the test are for withheld objects, if there are any. No test errand is one of training.
        """
        known, hidden = self.things()
        taken = {errand.text for errand in self.errands("train")} if part == "test" else set()
        half = self.test // 2 if hidden else 0
        wanted = [(known, self.train)] if part == "train" else [(known, self.test - half), (hidden, half)]
        found: list[Errand] = []
        for side, (things, count) in enumerate(wanted):
            rng, steps, tries = Seeds(self.seed).rng(Stream.INIT, node=1 + 2 * side + (part == "test")), 0, 0
            while steps < count:
                errand, tries = draw_errand(rng, things), tries + 1
                if tries > 20 * count + 1000:
                    raise ValueError(f"{part}: got {count} queries; there are not that many different errands")
                if errand.text not in taken:
                    taken.add(errand.text)
                    found.append(errand)
                    steps += len(errand.plan())
        return found

    def generate(self) -> Generated:
        """The pool of skills, and every step of the errands as a query; what goes beyond the size of a part is cut off."""
        documents, hidden, asked = pool(), self.things()[1], []
        number = {text: i for i, text in enumerate(documents)}
        for part in ("train", "test"):
            sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
            for errand in self.errands(part):
                steps = errand.plan()
                rows = [(progress(errand.text, steps[:i]), number[step]) for i, step in enumerate(steps)]
                sides[errand.goals[0][0] in hidden].extend(rows)
            half = getattr(self, part) // 2 if sides[1] else 0
            rows = sides[0][: getattr(self, part) - half] + sides[1][:half]
            asked.append(Asked(tuple(text for text, _ in rows), tuple(i for _, i in rows)))
        unseen = np.array([Skill.of(text).what in hidden for text in documents])
        return Generated(documents, unseen, asked[0], asked[1])
