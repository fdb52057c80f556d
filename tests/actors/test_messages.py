"""Messages are checked on receipt; roles without Ray."""

import numpy as np
import pytest

from actors.client import Client, joined
from actors.message import BadMessage, Message
from actors.peer import Peer
from actors.server import Server


def message(round=3, ids=(0, 1), rows=None, dtype=np.float32):
    ids = np.array(ids, dtype=np.int64)
    return Message(round, ids, np.ones((len(ids), 5), dtype) if rows is None else rows)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (message(round=2), "round 2 arrived in round 3"),
        (message(rows=np.ones((2, 4), np.float32)), r"\(2, 4\), expected float32 \(2, 5\)"),
        (message(rows=np.ones((3, 5), np.float32)), "expected float32"),
        (message(dtype=np.float64), "rows are float64"),
        (message(ids=(0, 9)), "sender 9 is not one of the 6 nodes"),
        (message(ids=(0, -1)), "not one of the 6 nodes"),
        (message(ids=(1, 1)), "appears twice"),
        (Message(3, np.array([0.0, 1.0]), np.ones((2, 5), np.float32)), "sender ids are float64"),
    ],
)
def test_a_malformed_message_is_refused_with_its_reason(bad, why):
    with pytest.raises(BadMessage, match=why):
        bad.check(3, 5, 6)


def test_non_finite_rows_pass_the_check_because_the_rule_counts_them():
    message(rows=np.full((2, 5), np.nan, np.float32)).check(3, 5, 6)


class Averager:
    """The least that a server needs."""

    def __init__(self, columns):
        self.model = np.zeros(5, np.float32)
        self.seen = None

    def survey(self, round, ids, rows):
        self.seen = ids, rows
        return rows.mean(0) if len(rows) else None

    def plan(self, round, surveys):
        return surveys[0]

    def step(self, round, plan):
        if plan is not None:
            self.model = plan
        return self.model

    def outcomes(self):
        return {}

    def state_dict(self):
        return {"model": self.model}

    def load_state_dict(self, state):
        self.model = state["model"]


def server():
    return Server(Averager, {"server-0": np.empty(0, np.int64)}, 6, lambda model, parts: {"size": float(len(parts))})


def test_a_server_uses_good_messages_and_counts_refused_ones():
    one = server()
    one.aggregate(3, message(ids=(0, 1)), message(round=2, ids=(2, 3)), message(ids=(4, 5), dtype=np.float64))
    assert one.block.seen[0].tolist() == [0, 1]
    assert one.counters() == {"messages": 2, "bytes": 2 * 5 * 4, "refused": 2}
    assert one.link_counts().messages.tolist() == [1, 1, 0, 0, 0, 0]


def test_a_node_has_one_vote():
    one = server()
    one.aggregate(3, message(ids=(0, 1)), message(ids=(1, 2), rows=np.full((2, 5), 7.0, np.float32)))
    ids, rows = one.block.seen
    assert ids.tolist() == [0, 1, 2]
    assert rows[1, 0] == 1.0
    assert one.counters()["refused"] == 1


def test_a_server_without_messages_keeps_its_model():
    one = server()
    assert one.aggregate(3, message(round=1)).tolist() == [0.0] * 5


def test_counters_survive_a_barrier_in_another_layout():
    one = server()
    one.aggregate(3, message())
    other = server()
    other.load(one.state())
    assert other.counters() == one.counters()


class Echo:
    """Clients that send their ids."""

    def __init__(self, ids):
        self.ids, self.model = ids, None

    def train(self, round):
        return self.ids, np.repeat(self.ids[:, None], 6, 1).astype(np.float32)

    def receive(self, round, model):
        self.model = model

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


def test_clients_cut_their_rows_into_shards_that_join_again():
    host = Client(Echo, {"clients-0": np.array([0, 2]), "clients-1": np.array([4])}, 6)
    parts = host.train(1, [0, 2, 6])
    assert [p.rows.shape for p in parts] == [(3, 2), (3, 4)]
    ids, rows = joined([*Client(Echo, {"c": np.array([5, 1])}, 6).train(1, [0, 2, 6]), *parts], 2)
    assert ids.tolist() == [0, 1, 2, 4, 5]
    assert rows[:, 5].tolist() == [0, 1, 2, 4, 5]
    host.receive(1, np.arange(2, dtype=np.float32), np.arange(4, dtype=np.float32))
    assert host.blocks["clients-1"].model.tolist() == [0, 1, 0, 1, 2, 3]
    assert host.counters()["bytes"] == 3 * 6 * 4


class Listener(Echo):
    """Peers that remember what they were told."""

    def exchange(self, round, ids, models, edges):
        self.told = ids.tolist(), edges
        return [ids[ids != i] for i in self.ids]

    def outcomes(self):
        return {"skipped": 0}


def test_peers_refuse_lies_of_another_round_or_shape():
    peer = Peer(Listener, {"peers-0": np.array([0, 1])}, 4, lambda parts: {})
    good = Message(5, np.array([0, 1, 2]), np.ones((3, 6), np.float32))
    peer.width = 6  # what its own peers sent
    edges = {(3, 0): np.ones(6, np.float32), (3, 1): np.ones(7, np.float32)}
    peer.exchange(5, (5, edges), good)
    ids, told = peer.blocks["peers-0"].told
    assert ids == [0, 1, 2]
    assert list(told) == [(3, 0)]
    assert peer.refused == 1
    assert peer.counters()["messages"] == 2 * 2  # as many as the block says that it received
    peer.exchange(5, (4, edges), good)
    assert peer.blocks["peers-0"].told[1] == {}
