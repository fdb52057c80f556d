"""Retrieval data by name: what each source becomes."""

import json

import numpy as np
import pytest

from raysys.data.datasets import DataError
from raysys.data.retrieval import load_retrieval, slugs, write_run


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    corpus = jsonl(
        {"_id": "a", "title": "Tea", "text": "grows in hills"}, {"_id": "b", "title": "", "text": "cats purr"},
        {"_id": "c", "text": "dogs bark"}, {"_id": "empty", "title": "", "text": " "},
    )  # fmt: skip
    asks = jsonl(
        {"_id": "q1", "text": "where does tea grow"}, {"_id": "q2", "text": "cats  purr"}, {"_id": "c", "text": "what barks"},
        {"_id": "q4", "text": "dogs bark"}, {"_id": "q5", "text": "nothing"},
    )  # fmt: skip
    head = "query-id\tcorpus-id\tscore\n"
    (tmp_path / "corpus.jsonl").write_text(corpus)
    (tmp_path / "queries.jsonl").write_text(asks)
    (tmp_path / "qrels/train.tsv").write_text(head + "q1\ta\t2\nq1\tb\t1\nq1\tc\t0\nq5\tempty\t1\n")
    (tmp_path / "qrels/test.tsv").write_text(head + "q2\ta\t1\nc\tb\t1\nq4\tc\t1\n")
    return tmp_path


def test_beir_joins_title_and_text_and_keeps_grades(beir):
    data = load_retrieval(str(beir))
    assert data.document_ids == ("a", "b", "c")
    assert data.documents == ("Tea grows in hills", "cats purr", "dogs bark")
    assert (data.train.ids, data.train.relevant, data.train.grades) == (("q1",), ((0, 1),), ((2, 1),))
    assert (data.kind, data.licence, data.known.tolist()) == ("real", "not known to raysys", [0, 1])
    assert "1 documents that are right for held-out queries only are withheld" in data.note
    assert "left out: 1 documents without text" in data.note
    assert "left out: 1 queries of train.tsv without a relevant document" in data.note


def test_a_document_that_is_the_query_is_itself_by_id_or_text_unless_it_is_judged_right(beir):
    data = load_retrieval(str(beir))
    assert data.test.ids == ("q2", "c", "q4")
    assert data.test.itself.tolist() == [1, 2, -1]
    assert "2 queries are documents themselves" in data.note


def test_beir_without_test_is_measured_on_dev_and_without_train_holds_out_a_fifth(beir):
    (beir / "qrels/test.tsv").rename(beir / "qrels/dev.tsv")
    assert "tested on dev.tsv" in load_retrieval(str(beir)).note
    (beir / "qrels/train.tsv").unlink()
    many = "".join(f"q{i}\tb\t1\n" for i in range(20))
    (beir / "queries.jsonl").write_text(jsonl(*({"_id": f"q{i}", "text": f"text {i}"} for i in range(20))))
    (beir / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + many)
    data = load_retrieval(str(beir))
    assert (len(data.train), len(data.test)) == (16, 4)
    assert set(data.train.ids).isdisjoint(data.test.ids)
    assert "no train.tsv: a fixed fifth of the queries of dev.tsv held out" in data.note


def test_strategyqa_asks_for_facts_and_merges_what_is_repeated(tmp_path):
    items = [
        {"question": f"is {i} odd?", "facts": [f"fact {i}", "numbers have parity", f"fact  {i}"]} for i in range(20)
    ]
    items.append({"question": "is 3  odd?", "facts": ["three is odd"]})
    (tmp_path / "train.json").write_text(json.dumps(items))
    data = load_retrieval(str(tmp_path))
    assert (len(data.documents), len(data.train), len(data.test), data.licence) == (22, 16, 4, "MIT")
    merged = next(q for q in (data.train, data.test) if "is 3 odd?" in q.texts)
    facts = [data.documents[i] for i in merged.relevant[merged.texts.index("is 3 odd?")]]
    assert facts == ["numbers have parity", "fact 3", "three is odd"]
    held = {i for right in data.test.relevant for i in right} - {i for right in data.train.relevant for i in right}
    assert held == set(np.flatnonzero(data.unseen))
    assert len(held) >= 4
    assert f"{len(held)} documents that are right for held-out queries only are withheld" in data.note


def test_a_document_that_is_right_for_nothing_stays_known_and_one_of_both_splits_too(beir):
    (beir / "qrels/train.tsv").write_text(HEAD + "q1\ta\t1\n")
    (beir / "qrels/test.tsv").write_text(HEAD + "q2\ta\t1\nq4\tc\t1\n")
    data = load_retrieval(str(beir))
    assert (data.documents[1], data.unseen.tolist()) == ("cats purr", [False, False, True])


def test_esconv_asks_with_the_latest_turns_and_without_strategies_numbers_or_the_reply(tmp_path):
    turns = [f"1.0 {i % 2} {i} {'[Other] ' if i % 2 else ''}word{i}  " for i in range(7)]
    train = "1.0 1 0 [Question] Hi\n" + " EOS ".join([*turns, "1.0 1 7 [Providing Suggestions] try tea"]) + "\n"
    (tmp_path / "devWithStrategy_short.tsv").write_text(train)
    long = " ".join(f"w{i}" for i in range(200))
    (tmp_path / "testWithStrategy_short.tsv").write_text(f"0.0 0 0 {long} EOS 1.0 1 1 [Other] I see\n")
    data = load_retrieval(str(tmp_path))
    assert data.train.texts == ("seeker: word2 supporter: word3 seeker: word4 supporter: word5 seeker: word6",)
    assert data.documents == ("other", "providing suggestions")
    assert [data.documents[i] for i in data.train.relevant[0]] == ["providing suggestions"]
    assert data.test.texts[0].split() == [f"w{i}" for i in range(120, 200)]
    assert "left out: 1 replies without anything before them" in data.note
    assert "non-commercial" in data.licence


def test_saycan_asks_for_the_next_skill_and_withholds_those_of_held_out_plans(tmp_path):
    plans = [f"Do {i}\t1. find the thing {i}, 2. pick up the thing, 3. done{'.' if i % 2 else ''}" for i in range(10)]
    (tmp_path / "saycan_plan_v0_l.tsv").write_text("INPUT\tOUTPUT\r\n" + "\r\n".join(plans) + "\r\n")
    data = load_retrieval(str(tmp_path))
    assert (len(data.train), len(data.test), len(data.documents), data.unseen.sum()) == (24, 6, 12, 2)
    first = data.test.texts[0].removeprefix("just done: nothing; asked: ")
    thing = first.removeprefix("Do ")
    assert data.test.texts[1:3] == (
        f"just done: find the thing {thing}; asked: {first}",
        f"just done: pick up the thing; asked: {first}; before: find the thing {thing}",
    )
    assert [data.documents[r[0]] for r in data.test.relevant[:3]] == [
        f"find the thing {thing}",
        "pick up the thing",
        "done",
    ]
    assert data.unseen[data.test.relevant[0][0]]
    assert not data.unseen[data.test.relevant[1][0]]


@pytest.mark.parametrize(
    ("name", "sizes", "unseen"),
    [
        ("banking77", (77, 7776, 3080), 17),
        ("clinc150", (150, 7500, 4500), 0),
        ("strategyqa", (5515, 1648, 412), 1088),
        ("esconv", (8, 2985, 2775), 0),
        ("saycan", (75, 401, 116), 7),
    ],
)
def test_real_sets_have_their_published_sizes_and_withhold_documents_with_all_their_queries(
    shared_data, name, sizes, unseen
):
    if not (shared_data / name).is_dir():
        pytest.skip(f"needs {shared_data / name}")
    data = load_retrieval(str(shared_data / name))
    assert (len(data.documents), len(data.train), len(data.test)) == sizes
    assert data.unseen.sum() == unseen
    assert not data.unseen[[i for r in data.train.relevant for i in r]].any()
    assert len(set(data.documents)) == len(data.documents)
    assert data.licence != "not known to raysys"
    assert all(text.strip() for text in (*data.documents, *data.train.texts, *data.test.texts))
    assert "  " not in "".join(data.documents)
    if unseen:
        assert data.unseen[[r[0] for r in data.test.relevant]].any()
    if name == "esconv":
        assert not any("EOS" in text or "[" in text.split(":")[0] for text in data.test.texts)
        assert max(len(text.split()) for text in data.train.texts) == 80


@pytest.mark.parametrize("name", ["rationale", "facts", "skills"])
def test_generated_sets_by_name_with_options(name):
    data = load_retrieval(f"{name}(train=120, test=40, seed=5, unseen=0.2)")
    assert (data.name, len(data.train), len(data.test), data.licence) == (name, 120, 40, "generated, no external text")
    assert data.kind == ("facts" if name == "facts" else "rationale")
    asked = data.unseen[[r[0] for r in data.test.relevant]].sum()
    assert (
        asked == 20 if name != "skills" else 5 <= asked < 20
    )  # half are about withheld objects, some of their steps are not
    assert set(data.known) == set(np.flatnonzero(~data.unseen))


def test_a_run_lists_the_best_documents_as_trec_reads_them():
    scores = np.array([[0.5, 2, -np.inf], [1, 1, 3]], np.float32)
    lines = write_run(("q1", "q2"), scores, ("a", "b", "c"), "mine", depth=2).splitlines()
    assert lines == ["q1 Q0 b 1 2 mine", "q1 Q0 a 2 0.5 mine", "q2 Q0 c 1 3 mine", "q2 Q0 a 2 1 mine"]


def beir_files():
    asked = "".join(f"q {i}\ta {i}\t1\n" for i in range(10))
    return {
        "corpus.jsonl": jsonl(
            *({"_id": f"a {i}", "text": f"text {i}"} for i in range(10)), {"_id": "a-1", "text": "x"}
        ),
        "queries.jsonl": jsonl(*({"_id": f"q {i}", "text": f"what is {i}"} for i in range(10))),
        "qrels/test.tsv": HEAD + asked,
    }


def banking_files():
    rows = "".join(f"ask for {i},Label {i}?\n" for i in range(20))
    return {"train.csv": "text,category\n" + rows, "test.csv": "text,category\n" + rows}


PUBLISHED = {
    "beir": beir_files,
    "strategyqa": lambda: {"train.json": json.dumps([{"question": f"is {i}?", "facts": [f"it is {i}"]} for i in range(10)])},
    "banking77": banking_files,
    "clinc150": lambda: {"data_small.json": json.dumps(
        {part: [[f"{part} {word}", f"do {word}"] for word in ("this", "that")] for part in ("train", "val", "test")}
        | {f"oos_{part}": [["no", "oos"]] for part in ("train", "val", "test")}
    )},
    "esconv": lambda: dict.fromkeys(
        ("devWithStrategy_short.tsv", "testWithStrategy_short.tsv"), "1.0 0 0 hello EOS 1.0 1 1 [Providing Suggestions] hi\n"
    ),
    "saycan": lambda: {"saycan_plan_v0_l.tsv": PLAN + "".join(f"Do {i}\t1. find {i}, 2. done\n" for i in range(10))},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_of_every_published_format_can_be_written_and_its_names_are_unique(tmp_path, name):
    for file, content in PUBLISHED[name]().items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    data = load_retrieval(str(tmp_path))
    assert data.name in (name, tmp_path.name)
    scores = np.zeros((len(data.test), len(data.documents)), np.float32)
    lines = write_run(data.test.ids, scores, data.document_ids, "t").splitlines()
    assert {len(line.split()) for line in lines} == {6}
    assert len(lines) == len(set(lines)) == scores.size
    assert len(set(data.document_ids)) == len(data.documents)


def test_names_without_white_space_stay_and_others_take_a_name_that_is_free():
    assert slugs(["a", "a b", "a-b", " a\tb", "c "]) == ("a", "a-b-2", "a-b", "a-b-3", "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "my run"}, "got the name 'my run'"),
        ({"ids": ("",)}, "got the name ''"),
        ({"depth": 0}, "depth: got 0"),
        ({"scores": np.zeros((2, 2), np.float32)}, r"got shape \(2, 2\); expected \(1, 2\)"),
        ({"scores": np.full((1, 2), np.nan, np.float32)}, "got nan"),
    ],
)
def test_a_run_that_cannot_be_read_back_is_refused(change, message):
    good = {"ids": ("q",), "scores": np.zeros((1, 2), np.float32), "document_ids": ("a", "b"), "tag": "t", "depth": 5}
    with pytest.raises(ValueError, match=message):
        write_run(**good | change)


def refused(source):
    with pytest.raises(DataError) as caught:
        load_retrieval(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "got '', which is neither rationale, rationale(...)"),
        ("/no/such/folder", "nor an existing folder"),
        ("rationale(documents=7)", "a multiple of 192"),
        ("facts(colour=red)", "'colour=red' is none of documents=INT"),
        ("skills(noise=0)", "'noise=0' is none of train=INT"),
        ("rationale(train=1.5)", "'train=1.5'"),
        ("rationale(seed=1", "none of"),
        ("facts(train=100000)", "there are at most"),
    ],
)
def test_a_bad_name_is_refused(source, message):
    assert message in refused(source)


HEAD = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n',
            "corpus.jsonl line 2: the _id 'a' occurs twice",
        ),
        ("corpus.jsonl", '{"text": "x"}\n', "corpus.jsonl line 1: _id is None, expected a name"),
        ("corpus.jsonl", '{"_id": "a", "text": 3}\n', "corpus.jsonl line 1: title and text must be text"),
        ("corpus.jsonl", "[]\n", "corpus.jsonl line 1 is '[]', expected one JSON object"),
        ("corpus.jsonl", b'{"_id": "a"}\n\xff\n', "corpus.jsonl line 2 is not UTF-8 text"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n', "queries.jsonl line 1: text is ' ', expected text"),
        ("queries.jsonl", None, "queries.jsonl, which is missing"),
        ("qrels/test.tsv", None, "test.tsv or dev.tsv, which are missing"),
        ("qrels/test.tsv", "q2\ta\t1\n", "test.tsv line 1 is 'q2\\ta\\t1', expected the header"),
        (
            "qrels/test.tsv",
            HEAD + "q2\ta\n",
            "test.tsv line 2 is 'q2\\ta', expected query, document and a whole number",
        ),
        ("qrels/test.tsv", HEAD + "q2\ta\t0.5\n", "test.tsv line 2"),
        ("qrels/test.tsv", HEAD + "q9\ta\t1\n", "test.tsv line 2: the query 'q9' is not in queries.jsonl"),
        ("qrels/train.tsv", HEAD + "q1\tz\t1\n", "train.tsv line 2: the document 'z' is not in corpus.jsonl"),
        ("qrels/test.tsv", HEAD + "q2\ta\t0\n", "has no test query with a right document"),
    ],
)
def test_a_damaged_beir_folder_is_refused(beir, file, content, message):
    if content is None:
        (beir / file).unlink()
    else:
        (beir / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(beir)


ESCONV = "1.0 0 0 hello EOS 1.0 1 1 [Other] hi\n"
PLAN = "INPUT\tOUTPUT\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "x"}, "holds none of corpus.jsonl, train.json, saycan_plan_v0_l.tsv"),
        ({"train.json": "[{"}, "train.json line 1 is not JSON"),
        ({"train.json": "{}"}, "holds a JSON dict, expected a list of questions"),
        ({"train.json": '[{"question": "a?", "facts": []}]'}, "train.json item 0"),
        ({"train.json": '[{"question": "a?", "facts": ["b", 3]}]'}, "train.json item 0"),
        ({"train.json": '["a"]'}, "train.json item 0"),
        ({"train.csv": "text,label\na,b\n", "test.csv": "text,label\na,b\n"}, "the header 'text,category' of BANKING77"),
        ({"train.csv": "text,category\na,b\n", "test.csv": "text,category\na,b\n"}, "has 1 intents; 17 are withheld"),
        ({"data_small.json": '{"train": [["a"]]}'}, "train item 0 is ['a']"),
        ({"devWithStrategy_short.tsv": ESCONV}, "testWithStrategy_short.tsv, which is missing"),
        (
            {"devWithStrategy_short.tsv": ESCONV + "1.0 0 0 hello\n", "testWithStrategy_short.tsv": ESCONV},
            "devWithStrategy_short.tsv line 2 is '1.0 0 0 hello', expected utterances",
        ),
        ({"devWithStrategy_short.tsv": ESCONV, "testWithStrategy_short.tsv": "x" + ESCONV}, "testWithStrategy_short.tsv line 1"),
        ({"saycan_plan_v0_l.tsv": "a\tb\n"}, "saycan_plan_v0_l.tsv line 1 is 'a\\tb', expected the header"),
        ({"saycan_plan_v0_l.tsv": PLAN + "Bring it\t1. find a coke, 3. done\n"}, "saycan_plan_v0_l.tsv line 2"),
        ({"saycan_plan_v0_l.tsv": PLAN + "Bring it\n"}, "line 2 is 'Bring it', expected an instruction, a tab"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_name_and_place(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert message in refused(tmp_path)
