"""A text classification task from a stated grammar: who acts? Its difficulty is one number and its ceilings are closed forms.

Every sentence tells of one act between two people; the label is the trade (one of 8 fields) of the one who ACTS.

    sentence -> one of TEMPLATES, which names the agent A, the other person P, a verb V, a time or place T
    A        -> "the" [adjective] a person of the label's field
    P        -> "the" [adjective] a person of another field (chance d), else one without a field (neighbour, cousin, ...)

Notable choices
- The difficulty d is the share of sentences in which both people have a field. In such a sentence A and P are exchangeable:
  the mirrored sentence, same template and same words with the two people swapped, is equally likely and has the other label.
  So no function of the bag of words knows better than a fair coin which of the two acts, and word order alone decides. In
  half of the templates A comes first, so "the first person" is a fair coin too: one has to tell active from passive, subject
  from object relative, and "not P but A".
- Label noise, the number of examples per class and the number of hard sentences are exact counts, not draws, so that the
  ceilings below hold for the very split and not only on average.
- No external text: the words are below, and the same seed gives the same sentences on any machine. At most 15 words.

Measured, noise .05 (ceiling .95), 4,000 training and 1,000 test sentences, seed 0; logistic regressions on TF-IDF of words, of
words and word pairs, and on the frozen mean-pooled MiniLM embedding; LoRA (r = 8, top two layers, frozen random head, AdamW
3e-3, batches of 16) after 50 to 400 steps on the first 500 test sentences:

    difficulty   best bag of words   TF-IDF words   + pairs   frozen MiniLM   LoRA after 50   100    200    400 steps
    0            .950                .950           .948      .950            .942            .944   .944   .944
    0.3          .809                .808           .872      .822            .804            .862   .922   .942
    0.6          .667                .672           .845      .724            .614            .776   .934   .942
    1            .479                .461           .810      .575            .440            .698   .930   .942
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysys.runtime.seeds import Seeds, Stream

FIELDS: dict[str, tuple[str, ...]] = {
    "farming": ("farmer", "shepherd", "gardener", "beekeeper", "rancher", "milkmaid"),
    "health": ("nurse", "doctor", "surgeon", "dentist", "pharmacist", "paramedic"),
    "kitchen": ("cook", "baker", "chef", "waiter", "butcher", "barista"),
    "law": ("judge", "lawyer", "attorney", "prosecutor", "notary", "detective"),
    "music": ("singer", "drummer", "guitarist", "violinist", "pianist", "composer"),
    "school": ("teacher", "professor", "tutor", "lecturer", "principal", "librarian"),
    "sport": ("boxer", "goalkeeper", "swimmer", "sprinter", "wrestler", "gymnast"),
    "transport": ("pilot", "driver", "sailor", "captain", "courier", "chauffeur"),
}
NO_FIELD = ("neighbour", "cousin", "friend", "stranger", "guest", "uncle")
ADJECTIVES = ("tired", "young", "tall", "quiet", "cheerful", "old", "nervous", "famous")
# Past tense and participle are the same word, so active and passive share their words.
VERBS = (
    *("thanked", "called", "helped", "visited", "greeted", "followed", "blamed", "invited", "warned", "praised"),
    *("phoned", "hugged", "trusted", "admired", "ignored", "interrupted", "met", "paid", "questioned", "believed"),
)
TIMES = (
    *("in the park", "at the market", "near the bridge", "by the window", "in the morning", "after lunch"),
    *("on monday", "last week", "at noon", "before sunset", "in the rain", "across the street"),
)
TEMPLATES = (
    "{A} {V} {P} {T}",
    "it was {A} who {V} {P} {T}",
    "it was by {A} that {P} was {V} {T}",
    "{A}, not {P}, {V} the children {T}",
    "the one whom {A} {V} {T} was {P}",
    "{P} was {V} by {A} {T}",
    "it was {P} whom {A} {V} {T}",
    "{P} was the one whom {A} {V} {T}",
    "not {P} but {A} {V} the children {T}",
    "the one who {V} {P} {T} was {A}",
)


@dataclass(frozen=True)
class Grammar:
    """How hard the task is and how much of it there is."""

    difficulty: float = 0.6
    """Share of sentences in which both people have a field, in [0, 1]."""
    noise: float = 0.05
    """Share of labels replaced by one of the 7 wrong ones, in [0, 7/8): the true label stays the likeliest."""
    train: int = 4000
    test: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.difficulty <= 1:
            raise ValueError(f"grammar difficulty: got {self.difficulty}; it must lie in [0, 1]")
        if not 0 <= self.noise < 1 - 1 / len(FIELDS):
            raise ValueError(f"grammar noise: got {self.noise}; it must lie in [0, {1 - 1 / len(FIELDS)})")
        for name in ("train", "test"):
            if getattr(self, name) < len(FIELDS):
                raise ValueError(f"grammar {name}: got {getattr(self, name)}; at least {len(FIELDS)}, one per class")
        Seeds(self.seed)  # refuses what is no seed

    @property
    def ceiling(self) -> float:
        """Accuracy of the one who always knows who acts, up to rounding the number of noisy labels: 1 - noise."""
        return 1 - self.noise

    @property
    def bag_of_words_ceiling(self) -> float:
        """Expected accuracy of the best classifier that ignores word order.

        It knows the agent's field in the 1 - d easy sentences; in the d hard ones it picks one of two equally likely fields
        and is also right when noise made the other's label the one that it picked.
        """
        hard = (1 - self.noise) / 2 + self.noise / 2 / (len(FIELDS) - 1)
        return (1 - self.difficulty) * (1 - self.noise) + self.difficulty * hard


def generate(grammar: Grammar, part: str) -> tuple[list[str], list[str]]:
    """The sentences and the labels (names of fields) of one part, `train` or `test`.

    Labels before noise differ by at most one in number; round(difficulty N) sentences are hard, round(noise N) labels wrong.
    """
    rng = Seeds(grammar.seed).rng(Stream.INIT, node=("train", "test").index(part))
    names, count = sorted(FIELDS), getattr(grammar, part)
    agent = rng.permutation(np.arange(count) % len(names))
    hard = rng.permutation(count) < round(grammar.difficulty * count)
    noisy = rng.permutation(count) < round(grammar.noise * count)
    other = (agent + rng.integers(1, len(names), count)) % len(names)
    wrong = (agent + rng.integers(1, len(names), count)) % len(names)

    def person(words: tuple[str, ...]) -> str:
        adjective = f"{rng.choice(ADJECTIVES)} " if rng.integers(2) else ""
        return f"the {adjective}{rng.choice(words)}"

    texts = [
        str(rng.choice(TEMPLATES)).format(
            A=person(FIELDS[names[a]]),
            P=person(FIELDS[names[o]] if h else NO_FIELD),
            V=rng.choice(VERBS),
            T=rng.choice(TIMES),
        )
        for a, o, h in zip(agent, other, hard, strict=True)
    ]
    return texts, [names[i] for i in np.where(noisy, wrong, agent)]
