"""A retrieval task whose queries and right documents share neither a word nor a meaning: only a hidden rule joins them.

A query tells of a place and of the state it is in; the right document names two things. Which two is a rule:

    query     "it has become icy here in our harbour"         place a = harbour (dock, pier, ...), state b = cold (icy, ...)
    document  "choose falcon together with saffron"           families pi(a) = birds (falcon, ...), sigma(b) = spices (...)

pi and sigma are one-to-one pairings drawn from the seed, so no knowledge of the world helps and a retriever must be trained. With
more than 192 documents a query also tells of a third thing, a companion c, and the document names a third family rho(c).

Notable choices
- No word of any query template or list occurs in any document template or list: a lexical score is zero for every pair.
- The pool holds every combination of (place, state[, companion]) exactly once, worded at random: 192 k documents for k
  companions. More wordings of one combination would be more right documents, and recall@1 could not reach 1.
- A share of the combinations is withheld from training wholly (`unseen`), while each place, state and companion occurs in
  others: who has learned the rule finds the withheld documents too; a classifier over the documents it was trained on cannot.
- Half of the test queries ask for withheld documents, half for known ones. No test query is a training query.
- Counts (queries per combination, noisy labels) are exact and not draws. The seed fixes everything, on any machine.
- Ceilings of recall@1: who knows the rule reaches 1 - noise; who knows places only, 1/(12 k); states only, 1/(16 k); a classifier
  over known documents, (1 - noise)/2; chance is 1/(192 k).

Measured without training, 400 test queries, seeds 0 / 1 / 2: recall@1 of frozen MiniLM's cosine .020 / .005 / .008 (recall@10
.06 / .04 / .09) and of BM25 .0052, which is 1/192 = .0052 by ties; with 1,536 documents 0 / 0 / 0 and .0007.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.runtime.seeds import Seeds, Stream

PLACES = (
    ("harbour", "dock", "pier", "wharf"), ("kitchen", "pantry", "scullery", "galley"), ("forest", "woods", "grove", "thicket"),
    ("school", "classroom", "college", "academy"), ("hospital", "clinic", "infirmary", "ward"),
    ("airport", "runway", "hangar", "terminal"), ("farm", "barn", "stable", "orchard"), ("theatre", "stage", "cinema", "opera"),
    ("church", "chapel", "cathedral", "abbey"), ("office", "bureau", "boardroom", "cubicle"), ("mine", "quarry", "shaft", "pit"),
    ("beach", "shore", "seaside", "dunes"), ("hotel", "inn", "hostel", "motel"), ("bank", "vault", "treasury", "mint"),
    ("museum", "gallery", "exhibition", "archive"), ("prison", "jail", "dungeon", "cell"),
)  # fmt: skip
STATES = (
    ("freezing", "icy", "chilly", "frosty"), ("hot", "boiling", "scorching", "sweltering"), ("wet", "soaked", "damp", "flooded"),
    ("dark", "unlit", "gloomy", "dim"), ("loud", "noisy", "deafening", "rowdy"), ("crowded", "packed", "jammed", "overfull"),
    ("dirty", "filthy", "muddy", "grimy"), ("empty", "deserted", "vacant", "abandoned"),
    ("broken", "cracked", "shattered", "damaged"), ("smoky", "hazy", "foggy", "misty"), ("windy", "stormy", "gusty", "breezy"),
    ("locked", "shut", "closed", "sealed"),
)  # fmt: skip
COMPANIONS = (
    ("child", "kid", "toddler"), ("soldier", "sergeant", "recruit"), ("dog", "puppy", "hound"),
    ("tourist", "visitor", "traveller"), ("thief", "burglar", "robber"), ("bride", "groom", "newlywed"),
    ("poet", "novelist", "writer"), ("king", "queen", "prince"),
)  # fmt: skip
QUERIES = (
    "we are at the {A} and everything is {B}",
    "it has become {B} here in our {A}",
    "the {A} where i stand looks {B} today",
    "what now? this {A} is {B}",
    "people say that the {A} got {B}",
)
COMPANION = ", beside me a {C}"

# pi(place), sigma(state), rho(companion) is one of these
THINGS = (
    ("sparrow", "falcon", "robin", "heron"), ("salmon", "trout", "herring", "cod"), ("oak", "birch", "maple", "willow"),
    ("tulip", "daisy", "orchid", "lily"), ("copper", "silver", "iron", "tin"), ("ruby", "emerald", "sapphire", "opal"),
    ("plum", "cherry", "mango", "apricot"), ("carrot", "turnip", "spinach", "leek"), ("hammer", "chisel", "wrench", "pliers"),
    ("violin", "trumpet", "cello", "flute"), ("scarf", "jacket", "mitten", "waistcoat"),
    ("lemonade", "cocoa", "cider", "espresso"), ("venus", "jupiter", "saturn", "neptune"),
    ("cricket", "tennis", "hockey", "fencing"), ("waltz", "tango", "polka", "ballet"), ("beetle", "moth", "wasp", "hornet"),
)  # fmt: skip
MANNERS = (
    ("japan", "korea", "vietnam", "thailand"), ("sweden", "poland", "austria", "belgium"),
    ("kenya", "ghana", "morocco", "nigeria"),
    ("peru", "chile", "brazil", "bolivia"), ("velvet", "linen", "wool", "cotton"), ("pepper", "cinnamon", "saffron", "ginger"),
    ("pudding", "pastry", "custard", "marmalade"), ("sofa", "wardrobe", "cupboard", "armchair"),
    ("tractor", "bicycle", "scooter", "caravan"), ("triangle", "circle", "hexagon", "sphere"),
    ("joy", "sorrow", "envy", "pride"), ("chemistry", "algebra", "botany", "physics"),
)  # fmt: skip
MARKS = (
    ("crimson", "scarlet", "maroon"), ("monday", "friday", "sunday"), ("january", "april", "october"),
    ("lion", "tiger", "leopard"), ("hebrew", "latin", "greek"), ("granite", "marble", "slate"),
    ("chess", "checkers", "domino"), ("cheddar", "brie", "gouda"),
)  # fmt: skip
DOCUMENTS = (
    "choose {P} together with {S}",
    "{P} goes first, then {S}",
    "send for {P} plus some {S}",
    "combine {P} with {S}",
    "answer: {S} over {P}",
)
MARK = ", using {R}"

BASE = len(PLACES) * len(STATES)
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Queries and, for each, the index of its one right document."""

    texts: tuple[str, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Generated:
    """A pool of m documents, which of them training never uses (m,), and the queries of the two splits."""

    documents: tuple[str, ...]
    unseen: NDArray[np.bool_]
    train: Asked
    test: Asked


class Noisy:
    """A task with wrong labels."""

    noise: float

    @property
    def ceiling(self) -> float:
        """Recall@1 of the one who understands every query, up to rounding the number of noisy labels: 1 - noise."""
        return 1 - self.noise


@dataclass(frozen=True)
class Rationale(Noisy):
    """How large the task is."""

    documents: int = BASE
    """192 k for k = 1..8 companions (k = 1: none is told of)."""
    train: int = 1200
    test: int = 400
    unseen: float = 0.15
    """Share of the documents withheld from training, in [0, 0.5]."""
    noise: float = 0.0
    """Share of queries, of training and of test, whose document is replaced by a wrong one, in [0, 1)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.documents % BASE or not 1 <= self.documents // BASE <= len(COMPANIONS):
            allowed = f"a multiple of {BASE} up to {BASE * len(COMPANIONS)}"
            raise ValueError(f"rationale documents: got {self.documents}; it must be {allowed}")
        check("rationale", self.unseen, self.noise, self.train, self.test, self.seed)

    def generate(self) -> Generated:
        """The pool and both splits.

        Raises:
            ValueError: more queries are asked for than there are different ones.
        """
        seeds, companions = Seeds(self.seed), self.documents // BASE
        rng = seeds.rng(Stream.INIT, node=0)
        pi, sigma, rho = rng.permutation(len(THINGS)), rng.permutation(len(MANNERS)), rng.permutation(len(MARKS))
        shape = (len(PLACES), len(STATES), companions)
        a, b, c = (v.reshape(-1) for v in np.indices(shape))
        with_third = companions > 1
        documents = []
        for i in range(self.documents):
            words = {"P": rng.choice(THINGS[pi[a[i]]]), "S": rng.choice(MANNERS[sigma[b[i]]])}
            third = MARK.format(R=rng.choice(MARKS[rho[c[i]]])) if with_third else ""
            documents.append(str(rng.choice(DOCUMENTS)).format(**words) + third)
        # Lying in the order of the combinations, near documents would be alike: a position must not tell anything.
        order = rng.permutation(self.documents)
        unseen = withhold([a, b, c], round(self.unseen * self.documents), seeds.rng(Stream.INIT, node=1))

        def forms(i: int) -> list[str]:
            thirds = [COMPANION.format(C=w) for w in COMPANIONS[c[i]]] if with_third else [""]
            places, states = PLACES[a[i]], STATES[b[i]]
            return [t.format(A=p, B=s) + third for t in QUERIES for p in places for s in states for third in thirds]

        asked = ask([forms(i) for i in order], unseen[order], self.train, self.test, self.noise, seeds)
        return Generated(tuple(documents[i] for i in order), unseen[order], *asked)


def check(name: str, unseen: float, noise: float, train: int, test: int, seed: int) -> None:
    """Raise ValueError, one sentence, for a size or a share that cannot be."""
    if not 0 <= unseen <= 0.5:
        raise ValueError(f"{name} unseen: got {unseen}; it must lie in [0, 0.5]")
    if not 0 <= noise < 1:
        raise ValueError(f"{name} noise: got {noise}; it must lie in [0, 1)")
    for part, count in (("train", train), ("test", test)):
        if count < 2:
            raise ValueError(f"{name} {part}: got {count}; it must be at least 2")
    Seeds(seed)  # refuses what is no seed


def withhold(attributes: Sequence[I64], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """`count` withheld items (m,), chosen at random so that every value of every attribute (m,) keeps a third of its items."""
    unseen = np.zeros(len(attributes[0]), bool)
    left = [np.bincount(values) for values in attributes]
    least = [-(-counts // 3) for counts in left]
    for i in rng.permutation(len(unseen)):
        if unseen.sum() < count and all(n[v[i]] > low[v[i]] for n, v, low in zip(left, attributes, least, strict=True)):
            unseen[i] = True
            for n, v in zip(left, attributes, strict=True):
                n[v[i]] -= 1
    return unseen


def ask(
    forms: Sequence[Sequence[str]], unseen: NDArray[np.bool_], train: int, test: int, noise: float, seeds: Seeds
) -> tuple[Asked, Asked]:
    """Queries of both splits: `forms[i]` are all the ways to ask for document i, two thirds of which are for training.

    Documents of a part are asked for equally often, up to one; half of the test queries are for unseen ones.

    Raises:
        ValueError: there are fewer different queries than are asked for.
    """
    known, hidden = np.flatnonzero(~unseen), np.flatnonzero(unseen)
    half = test // 2 if len(hidden) else 0
    sides = []
    for part, parts in enumerate(([(known, train)], [(known, test - half), (hidden, half)])):
        rng = seeds.rng(Stream.INIT, node=2 + part)
        texts: list[str] = []
        answer: list[int] = []
        for pool, count in parts:
            asked = np.resize(rng.permutation(pool), count)
            used = dict.fromkeys(pool.tolist(), 0)
            for i in asked.tolist():
                ways = seeds.rng(Stream.SHUFFLE, node=i).permutation(len(forms[i]))
                cut = 2 * len(ways) // 3
                ways = ways[cut:] if part else ways[:cut]
                if used[i] == len(ways):
                    raise ValueError(
                        f"{'test' if part else 'train'}: got {count} queries for {len(pool)} documents; "
                        f"there are at most {len(pool) * len(ways)} different ones"
                    )
                texts.append(forms[i][ways[used[i]]])
                used[i] += 1
            wrong = rng.permutation(count) < round(noise * count)
            shifted = pool[
                (np.searchsorted(pool, asked) + rng.integers(1, max(2, len(pool)), count)) % max(1, len(pool))
            ]
            answer += np.where(wrong, shifted, asked).tolist()
        order = rng.permutation(len(texts))
        sides.append(Asked(tuple(texts[i] for i in order), tuple(answer[i] for i in order)))
    return sides[0], sides[1]
