import re
from collections import Counter

import numpy as np
import pytest

from raysys.data.grammar import FIELDS, NO_FIELD, TEMPLATES, VERBS, Grammar, generate

FIELD_OF = {word: field for field, words in FIELDS.items() for word in words}


def parse(text: str) -> tuple[str, str | None]:
    """Fields of the agent and of the other person, by matching the templates: the rule, independent of the generator."""
    person = rf"the (?:\w+ )?({'|'.join([*FIELD_OF, *NO_FIELD])})"
    for template in TEMPLATES:
        pattern = template.replace("{A}", "#A").replace("{P}", "#P").replace("{V}", f"(?:{'|'.join(VERBS)})")
        order = re.findall(r"#([AP])", pattern)
        pattern = re.sub(r"#[AP]", lambda _: person, pattern).replace("{T}", ".*?")
        match = re.fullmatch(pattern, text)
        if match:
            people = dict(zip(order, match.groups(), strict=True))
            return FIELD_OF[people["A"]], FIELD_OF.get(people["P"])
    raise AssertionError(f"no template matches {text!r}")


def test_swapping_the_people_of_a_template_keeps_its_bag_of_words():
    for template in TEMPLATES:
        one = template.format(A="nurse", P="pilot", V="met", T="at noon")
        two = template.format(A="pilot", P="nurse", V="met", T="at noon")
        assert one != two
        assert Counter(re.findall(r"\w+", one)) == Counter(re.findall(r"\w+", two))


def test_the_agent_comes_first_in_half_of_the_templates():
    assert sum(t.index("{A}") < t.index("{P}") for t in TEMPLATES) * 2 == len(TEMPLATES)


def test_words_are_used_for_one_purpose_only():
    words = [w for group in FIELDS.values() for w in group] + list(NO_FIELD)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(("difficulty", "noise"), [(0.0, 0.0), (0.3, 0.05), (1.0, 0.1)])
def test_noise_difficulty_and_balance_are_exact_counts(difficulty, noise):
    grammar = Grammar(difficulty, noise, train=1203, test=400)
    for part in ("train", "test"):
        texts, labels = generate(grammar, part)
        parsed = [parse(t) for t in texts]
        count = len(texts)
        assert sum(a != y for (a, _), y in zip(parsed, labels, strict=True)) == round(noise * count)
        assert sum(o is not None for _, o in parsed) == round(difficulty * count)
        assert all(a != o for a, o in parsed)
        classes = Counter(a for a, _ in parsed)
        assert set(classes) == set(FIELDS)
        assert max(classes.values()) - min(classes.values()) <= 1
        assert max(len(t.split()) for t in texts) <= 15


@pytest.mark.parametrize("difficulty", [0.0, 0.6, 1.0])
def test_a_linear_model_of_the_words_reaches_the_bag_of_words_ceiling_and_not_more(difficulty):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    grammar = Grammar(difficulty, test=2000)
    (train, y), (test, z) = generate(grammar, "train"), generate(grammar, "test")
    words = CountVectorizer(vocabulary=sorted(FIELD_OF))
    found = MultinomialNB().fit(words.fit_transform(train), y).score(words.transform(test), z)
    error = np.sqrt(grammar.bag_of_words_ceiling * (1 - grammar.bag_of_words_ceiling) / 2000)
    assert abs(found - grammar.bag_of_words_ceiling) < 3 * error + 1e-9


def test_ceilings_meet_where_nothing_is_hard():
    assert Grammar(0, noise=0.05).bag_of_words_ceiling == Grammar(0, noise=0.05).ceiling == 0.95
    assert Grammar(1, noise=0).bag_of_words_ceiling == 0.5


def test_sentences_depend_on_seed_and_part_alone():
    grammar = Grammar(train=200, test=200)
    assert generate(grammar, "train") == generate(Grammar(train=200, test=50), "train")
    assert generate(grammar, "train")[0] != generate(grammar, "test")[0]
    assert generate(grammar, "train")[0] != generate(Grammar(train=200, test=200, seed=1), "train")[0]
    assert generate(grammar, "train")[0][0] == "the teacher, not the goalkeeper, invited the children in the park"
