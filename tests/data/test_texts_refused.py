"""Text data by name, and what is refused: every refusal is one sentence."""

import sys
from types import SimpleNamespace

import pytest

from raysys.data import load_texts
from raysys.data.datasets import DataError


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def refused(source):
    with pytest.raises(DataError) as caught:
        load_texts(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("grammar(x=1)", "'x=1' is none of difficulty=FLOAT"),
        ("grammar(difficulty=2)", r"got 2.0; it must lie in [0, 1]"),
        ("grammar(difficulty=nan)", "got nan"),
        ("grammar(noise=0.9)", "[0, 0.875)"),
        ("grammar(train=3)", "at least 8"),
        ("grammar(train=2.5)", "'train=2.5'"),
        ("grammar(seed=-1)", "seed"),
        ("grammar(0.3", "none of"),
    ],
)
def test_a_bad_grammar_is_refused(source, message):
    assert message in refused(source)


# the hub


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


class Part(list):
    def __init__(self, names, rows):
        super().__init__(rows)
        self.features = {"label": SimpleNamespace(names=names)}


def test_glue_by_name_takes_the_validation_split_as_test(monkeypatch):
    def load(name, task):
        assert (name, task) == ("nyu-mll/glue", "mnli")
        names = ["entailment", "neutral", "contradiction"]
        rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i - 1, "idx": i} for i in range(4)]
        return {
            "train": Part(names, rows),
            "validation_matched": Part(names, rows[1:]),
            "test_matched": Part(names, []),
        }

    hub(monkeypatch, load)
    data = load_texts("glue/mnli")
    assert (len(data.train), len(data.test), data.train.second[0], data.train.y.tolist()) == (3, 3, "h1", [0, 1, 2])
    assert data.note == "left out: 1 training items without a gold label"


def test_glue_without_package_or_network_gives_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused("glue/sst2") == "data: glue/sst2 needs the package datasets; install raysys[hub]"

    def offline(name, task):
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    hub(monkeypatch, offline)
    assert "glue/sst2 could not be loaded (ConnectionError: Couldn't reach the Hub)" in refused("glue/sst2")
    assert "allowed are glue/cola" in refused("glue/nli")


# damaged files

GOOD = "text,label\na,x\nb,y\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train__csv": GOOD}, "train.csv but no labelled test.csv"),
        (
            {"train__csv": "text,mark\na,x\n", "test__csv": GOOD},
            "has the columns text, mark; it needs columns text[,text2]",
        ),
        ({"train__csv": GOOD + "c\n", "test__csv": GOOD}, "train.csv line 4 has 1 fields, the header has 2"),
        ({"train__csv": GOOD, "test__csv": GOOD + "c,z\n"}, "test.csv line 4: the label 'z' does not occur in"),
        ({"train__csv": GOOD + "c,\n", "test__csv": GOOD}, "line 4: the label is empty"),
        ({"train__csv": GOOD + 'c,"x"y\n', "test__csv": GOOD}, "train.csv line 4 is not a table row"),
        (
            {"train__csv": GOOD.encode() + b"\xe9,x\n", "test__csv": GOOD},
            "train.csv line 4 is not UTF-8 text (byte 0xe9)",
        ),
        ({"train__csv": "text,label\na,x\nb,x\n", "test__csv": GOOD}, "has one label only, 'x'"),
        ({"train__csv": "text,label\n", "test__csv": GOOD}, "train.csv holds no labelled text"),
        ({"train__csv": "", "test__csv": GOOD}, "train.csv holds no labelled text"),
        ({"train__csv": "text,text2,label\na,b,x\nc,d,y\n", "test__csv": GOOD}, "must both hold pairs"),
        (
            {"train__jsonl": '{"text": "a", "label": "x"}\n{"text":', "test__jsonl": "{}"},
            "train.jsonl line 2 is '{\"text\":'",
        ),
        ({"train__jsonl": '{"text": 3, "label": "x"}', "test__jsonl": "{}"}, "line 1: text is 3, expected text"),
        ({"train__jsonl": '{"text": "a", "label": 1.5}', "test__jsonl": "{}"}, "line 1: label is 1.5, expected text"),
        ({"train__jsonl": "[1]", "test__jsonl": "{}"}, "line 1 is '[1]', expected one JSON object"),
        (
            {"TREC__train__all": "0 a\n7 b\n", "TREC__test__all": "0 a\n"},
            "TREC.train.all line 2 is '7 b', expected a label (0|1",
        ),
        ({"TREC__train": "DESC how\n", "TREC__test": "DESC:x a\n"}, "TREC.train line 1 is 'DESC how'"),
        ({"stsa__binary__train": "1\n", "stsa__binary__test": "1 a\n"}, "line 1 is '1', expected a label"),
        ({"data_small__json": "{"}, "data_small.json line 1 is not JSON"),
        ({"data_small__json": "[]"}, "holds a JSON list"),
        ({"data_small__json": '{"train": []}'}, "needs a list of [text, intent] pairs under 'train'"),
        ({"data_small__json": '{"train": [["a"]]}'}, "train item 0 is ['a'], expected [text, intent]"),
        (
            {"data_small__json": '{"train": [["a", "b"]]}', "domains__json": '{"d": ["c"]}'},
            "the intent 'b' is not in",
        ),
        (
            {"data_small__json": '{"train": [["a", "b"]]}', "domains__json": '{"d": "c"}'},
            "must map each domain to a list",
        ),
        ({"notes__txt": "hello"}, "holds no known pair of files: TREC.train.all + TREC.test.all"),
        ({"train__pkl": b"\x80\x04.", "test__pkl": b"\x80\x04."}, "holds no known pair of files"),
    ],
)
def test_a_damaged_folder_is_refused_with_file_and_line(tmp_path, files, message):
    assert message in refused(write(tmp_path, **files))


def test_an_empty_text_is_left_out_and_counted(tmp_path):
    data = load_texts(write(tmp_path, train__csv=GOOD + " ,x\n", test__csv=GOOD))
    assert len(data.train) == 2
    assert data.note == "left out: 1 training items with an empty text"


@pytest.mark.parametrize("source", ["", "no/such/folder", "grammars", "sst2"])
def test_an_unknown_source_is_refused_with_what_is_allowed(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"got {source!r}, which is neither grammar, grammar(...), glue/TASK" in refused(source)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    write(tmp_path, model__pkl=b"\x80\x04.")
    assert "must be a .csv, .tsv or .jsonl table" in refused(tmp_path / "model.pkl")
