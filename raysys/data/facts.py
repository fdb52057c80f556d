"""A retrieval task of plain facts: the query names a person and asks for one of six things about them, the document tells it.

    query     "what does Dorwick do for a living"
    document  "Talvo Dorwick earns his bread as a blacksmith"

Notable choices
- Persons are made up (two syllables and two parts, each name once), so no model can know them by heart.
- Six documents a person: what has to be matched is the name, in part or whole, AND the thing asked for, in other words. So
  words in common lead to the person and meaning to the document among six: what embedding models are made for, in contrast
  to the task of raysys.data.rationales, which this one is the control of.
- The pool is larger than the hidden size of a small student: its score matrix cannot be of full rank.
- A share of the persons is withheld from training with all their documents (`unseen`); half of the test queries ask for those. No
  test query is a training query, and the ceiling of recall@1 is 1 - noise. Chance is 1/documents.

Measured without training, 400 test queries, seeds 0 / 1 / 2: recall@1 of frozen MiniLM's cosine .88 / .86 / .83 (recall@10 1.00 /
1.00 / .99), of BM25 .30 / .26 / .28: a name finds its six documents, and few questions share a word with the right one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysys.data.rationales import Generated, Noisy, ask, check
from raysys.runtime.seeds import Seeds, Stream

FIRST = (
    ("Tal", "Bren", "Cor", "Der", "Fal", "Gar", "Hol", "Jor", "Kel", "Lam", "Mar", "Nor", "Per", "Quil", "Ran", "Sel"),
    ("vo", "da", "nik", "wen", "rim", "sa", "lo", "eth", "is", "ana", "ulf", "ero"),
)
LAST = (
    (
        "Dor",
        "Ash",
        "Black",
        "Cald",
        "Dun",
        "Elm",
        "Fair",
        "Grim",
        "Hart",
        "Kings",
        "Lang",
        "Mill",
        "North",
        "Oak",
        "Penn",
        "Rook",
    ),
    ("wick", "ford", "more", "ley", "worth", "bury", "holm", "stead", "gate", "brook", "mere", "field"),
)
# what is told: the statement, what may stand in it, and ways to ask for it
FACTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "{N} lives in {V}",
        ("Lisbon", "Oslo", "Cairo", "Dublin", "Prague", "Vienna", "Madrid", "Athens", "Warsaw", "Geneva", "Toronto", "Havana"),
        ("where is the home of {N}", "which town does {N} live in", "where can one visit {N}", "what is the address of {N}",
         "in what city does {N} reside"),
    ),
    (
        "{N} earns a living as a {V}",
        ("blacksmith", "tailor", "miller", "carpenter", "plumber", "weaver", "potter", "mason", "roofer", "glazier", "tanner",
         "cooper"),
        ("what does {N} do for a living", "which trade does {N} follow", "what is the job of {N}", "what work does {N} do",
         "what is the profession of {N}"),
    ),
    (
        "{N} was born in {V}",
        tuple(str(year) for year in range(1803, 1899, 8)),
        ("when was {N} born", "in which year did {N} come into the world", "what is the birth year of {N}", "how old is {N}",
         "when is the birthday of {N}"),
    ),
    (
        "{N} likes to eat {V}",
        ("dumplings", "pancakes", "lentils", "noodles", "goulash", "risotto", "porridge", "omelettes", "paella", "ravioli",
         "stew", "curry"),
        ("what is the favourite food of {N}", "what does {N} have for dinner", "which dish does {N} enjoy",
         "what should one cook for {N}", "what does {N} order at a restaurant"),
    ),
    (
        "{N} keeps a {V} as a pet",
        ("parrot", "tortoise", "ferret", "goat", "hamster", "kitten", "donkey", "goose", "rabbit", "pony", "lizard", "spaniel"),
        ("which animal belongs to {N}", "what pet does {N} have", "what creature does {N} look after",
         "who is the animal friend of {N}",
         "what animal lives with {N}"),
    ),
    (
        "{N} plays the {V}",
        ("harp", "banjo", "organ", "clarinet", "oboe", "guitar", "piano", "bassoon", "accordion", "lute", "trombone", "fiddle"),
        ("which instrument does {N} play", "what music does {N} make", "on what does {N} perform at concerts",
         "what does {N} practise in the orchestra", "what musical talent has {N}"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Facts(Noisy):
    """How large the task is."""

    documents: int = 600
    """Six a person."""
    train: int = 1200
    test: int = 400
    unseen: float = 0.15
    """Share of the persons withheld from training, in [0, 0.5]."""
    noise: float = 0.0
    """Share of queries, of training and of test, whose document is replaced by a wrong one, in [0, 1)."""
    seed: int = 0

    def __post_init__(self) -> None:
        most = min(len(FIRST[0]) * len(FIRST[1]), len(LAST[0]) * len(LAST[1])) * len(FACTS)
        if self.documents % len(FACTS) or not 2 * len(FACTS) <= self.documents <= most:
            allowed = f"a multiple of {len(FACTS)} from {2 * len(FACTS)} to {most}"
            raise ValueError(f"facts documents: got {self.documents}; it must be {allowed}")
        check("facts", self.unseen, self.noise, self.train, self.test, self.seed)

    def generate(self) -> Generated:
        """The pool and both splits.

        Raises:
            ValueError: more queries are asked for than there are different ones.
        """
        seeds, persons = Seeds(self.seed), self.documents // len(FACTS)
        rng = seeds.rng(Stream.INIT, node=0)
        first, last = ([a + b for a in heads for b in tails] for heads, tails in (FIRST, LAST))
        first, last = ([names[i] for i in rng.permutation(len(names))[:persons]] for names in (first, last))
        documents = [
            told.format(N=f"{one} {two}", V=rng.choice(values))
            for one, two in zip(first, last, strict=True)
            for told, values, _ in FACTS
        ]
        order = rng.permutation(self.documents)
        withheld = rng.permutation(persons) < round(self.unseen * persons)
        unseen = np.repeat(withheld, len(FACTS))[order]
        forms = [
            [
                way.format(N=name)
                for way in FACTS[i % len(FACTS)][2]
                for name in self._names(first, last, i // len(FACTS))
            ]
            for i in order
        ]
        asked = ask(forms, unseen, self.train, self.test, self.noise, seeds)
        return Generated(tuple(documents[i] for i in order), unseen, *asked)

    @staticmethod
    def _names(first: list[str], last: list[str], person: int) -> tuple[str, str, str]:
        """What a person may be called: whole name, surname, first name; all three are theirs alone."""
        return f"{first[person]} {last[person]}", last[person], first[person]
