"""Index folders: exact results, recall of the graph, damage, and builds that were interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

import raysys.systems.rabtriever.index as module
from raysys.runtime.sentences import UserError
from raysys.systems.rabtriever.build import Builder, digest_of, remove_build, write_index
from raysys.systems.rabtriever.chunks import Chunk
from raysys.systems.rabtriever.index import VectorIndex, best, recall
from raysys.systems.rabtriever.versions import Root, publish, shard_of

D = 24


def vectors(m: int, seed: int = 0, clusters: int = 30, centres: int = 0) -> np.ndarray:
    """(m, D) in clusters, with norms from about 1 to 12."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(100 + centres).standard_normal((clusters, D))
    made = middles[rng.integers(clusters, size=m)] + 0.3 * rng.standard_normal((m, D))
    return (made * np.exp(rng.normal(0, 0.2, (m, 1)))).astype(np.float32)


def write(folder: Path, z: np.ndarray, kind: str = "flat", ids: list[str] | None = None) -> VectorIndex:
    folder.mkdir(parents=True)
    ids = ids or [f"d{i}" for i in range(len(z))]
    parts = [
        Chunk(ids[i : i + 700], [f"text {one}" for one in ids[i : i + 700]], z[i : i + 700])
        for i in range(0, len(z), 700)
    ]
    write_index(folder, parts, z.shape[1], "model", kind)  # type: ignore[arg-type]
    return VectorIndex(folder)


@pytest.mark.parametrize("n", [1, 7, 64])
def test_flat_equals_faiss_IndexFlatIP_in_documents_and_order(tmp_path: Path, n: int) -> None:
    z, u = vectors(5000), vectors(n, seed=1)
    index, peer = write(tmp_path / "i", z), faiss.IndexFlatIP(D)
    peer.add(z)
    scores, ids = index.search(u, 20)
    theirs, places = peer.search(u, 20)
    assert ids == [[f"d{p}" for p in row] for row in places]
    np.testing.assert_allclose(scores, theirs, rtol=1e-5)


def test_scores_are_the_same_bits_whoever_shares_the_batch(tmp_path: Path) -> None:
    index, u = write(tmp_path / "i", vectors(3000)), vectors(40, seed=1)
    together, ids = index.search(u, 10)
    for i in range(40):
        alone, mine = index.search(u[i : i + 1], 10)
        assert alone.tobytes() == together[i : i + 1].tobytes()
        assert mine[0] == ids[i]


def test_equal_scores_go_by_position_however_many_there_are(tmp_path: Path) -> None:
    z = np.repeat(vectors(20), 150, axis=0)
    index = write(tmp_path / "i", z)
    for n, k in [(1, 7), (30, 7), (2, 151), (1, 3000)]:
        u = vectors(n, seed=3)
        exact = np.array([(z.astype(np.float64) * one).sum(1) for one in u], np.float32)
        order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        scores, ids = index.search(u, k)
        assert ids == [[f"d{p}" for p in row] for row in order]
        assert np.array_equal(scores, np.take_along_axis(exact, order, 1))


def test_dead_documents_never_push_a_living_one_out(tmp_path: Path) -> None:
    z, u = vectors(4000), vectors(5, seed=1)
    index = write(tmp_path / "i", z)
    order = np.argsort(-(u.astype(np.float64) @ z.T.astype(np.float64)), axis=1, kind="stable")
    for count in (1, 30, 500, 3995, 4000):
        dead = np.zeros(len(z), np.bool_)
        dead[order[0, :count]] = True
        scores, positions = best(index, u, 10, dead)
        assert scores.shape == (5, min(10, 4000 - count))
        for i in range(5):
            assert positions[i].tolist() == [p for p in order[i] if not dead[p]][:10]


@pytest.mark.parametrize("what", ["no vector", "one document many times", "twins whose products round apart"])
def test_queries_for_which_most_documents_tie_cost_little_more_than_others_and_keep_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    z, u = vectors(6000), vectors(12, seed=1)
    if what == "no vector":
        u[:] = 0
    elif what == "one document many times":
        z[100:5900] = 3 * u.mean(0)
        u = np.repeat(u.mean(0, keepdims=True), 12, 0)
    else:
        z[100:5900] = np.float32(1) + np.arange(5800, dtype=np.float32)[:, None] % 3 * np.float32(2**-23)
        u = 1 + np.abs(u)
    index, dead, asked = write(tmp_path / "i", z), np.zeros(6000, np.bool_), []
    dead[[0, 1, 200, 5000]] = True
    counted = module.products
    monkeypatch.setattr(module, "products", lambda u, z, found: (asked.append(found.size), counted(u, z, found))[1])
    exact = np.array([(z.astype(np.float64) * one).sum(1) for one in u]).astype(np.float32)
    exact[:, dead] = -np.inf
    order = np.argsort(-exact, axis=1, kind="stable")
    for k in (1, 10, 50):
        asked.clear()
        scores, positions = best(index, u, k, dead)
        assert np.array_equal(positions, order[:, :k])
        assert np.array_equal(scores, np.take_along_axis(exact, order[:, :k], 1))
        assert sum(asked) <= 12 * (2048 + 8 * k) < 12 * 6000, "documents scored one by one in float64"


@pytest.mark.parametrize("like", [True, False], ids=["queries like documents", "queries unlike documents"])
def test_the_graph_finds_95_of_100_best_on_clusters_of_many_norms_with_exact_scores(tmp_path: Path, like: bool) -> None:
    z = vectors(12_000, clusters=100)
    u = vectors(200, seed=7, clusters=100, centres=0 if like else 3)
    index = write(tmp_path / "i", z, "hnsw")
    assert recall(index, u) >= 0.95
    scores, positions = best(index, u, 10)
    exact = u.astype(np.float64) @ z.T.astype(np.float64)
    assert np.allclose(scores, np.take_along_axis(exact, positions, 1), rtol=1e-6)
    assert (np.diff(scores) <= 0).all()
    far, same = best(index, 1024 * u, 10)
    assert np.array_equal(same, positions), "the scale of a query changes nothing"
    assert np.array_equal(far, 1024 * scores)


def test_the_graph_gives_living_documents_also_where_all_near_ones_are_dead(tmp_path: Path) -> None:
    z, u = vectors(2000), vectors(3, seed=1)
    index, dead = write(tmp_path / "i", z, "hnsw"), np.ones(2000, np.bool_)
    dead[[5, 1200]] = False
    for row in best(index, u, 10, dead)[1]:
        assert sorted(row.tolist()) == [5, 1200]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_small_and_empty_indexes_answer(tmp_path: Path, kind: str) -> None:
    u = vectors(2, seed=1)
    assert write(tmp_path / "none", vectors(0), kind).search(u, 5)[1] == [[], []]
    one = write(tmp_path / "one", vectors(1), kind)
    assert one.search(u, 5)[1] == [["d0"], ["d0"]]
    assert one.search(0 * u, 5)[0].tolist() == [[0.0], [0.0]]


def test_ids_and_texts_of_any_alphabet_are_found(tmp_path: Path) -> None:
    ids = ["é/ü", "日本", "a\nb", "x" * 300, " "]
    index = write(tmp_path / "i", vectors(5), ids=ids)
    assert [index.where(one) for one in ids] == [0, 1, 2, 3, 4]
    assert [index.text(i) for i in range(5)] == [f"text {one}" for one in ids]
    assert index.where("missing") == -1


def test_queries_of_another_width_or_not_finite_are_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "i", vectors(10))
    for u, k in [(np.ones((1, D + 1)), 1), (np.ones(D), 1), (np.full((1, D), np.nan), 1), (np.ones((1, D)), 0)]:
        with pytest.raises(ValueError, match=r"got|hold"):
            index.search(u.astype(np.float32), k)


def test_vectors_are_mapped_not_read(tmp_path: Path) -> None:
    index = write(tmp_path / "i", vectors(10))
    assert isinstance(index.vectors.base, np.memmap)
    assert not index.vectors.flags.writeable


def test_serving_an_index_imports_neither_torch_nor_ray() -> None:
    asked = (
        "import sys, raysys.systems.rabtriever.live; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "i"
    write(folder, vectors(300), "hnsw")
    return folder


FILES = ["vectors.npy", "ids.bin", "ids.npy", "texts.bin", "texts.npy", "lookup.npy", "graph.faiss", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "foreign"])
def test_a_damaged_cut_missing_or_foreign_file_is_told_in_one_sentence(
    whole: Path, tmp_path: Path, file: str, harm: str
) -> None:
    folder = tmp_path / "i"
    shutil.copytree(whole, folder)
    path = folder / file
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "foreign":
        path.write_bytes(b"\x80\x04pickle" * (len(content) // 8 + 1))
    elif file != "manifest.json":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes().replace(b'"m": 300', b'"m": 301'))
    with pytest.raises(UserError, match=r"index: .*(damaged|there is no manifest)") as told:
        VectorIndex(folder)
    assert "\n" not in str(told.value)


def test_a_manifest_whose_hashes_fit_but_whose_sizes_do_not_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in (
        {"d": D + 1},
        {"m": 301},
        {"kind": "ivf"},
        {"format": 2},
        {"fingerprint": ""},
        {"m": True},
        {"files": {}},
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match="damaged"):
            VectorIndex(folder)


def test_an_index_of_another_model_is_refused(whole: Path) -> None:
    with pytest.raises(UserError, match="holds vectors of the model model; expected those of other"):
        VectorIndex(whole, "other")
    assert VectorIndex(whole, "model").size == 300


# ---------------------------------------------------------------- builds and versions


def put_all(builder: Builder, z: np.ndarray, stop: int = 10) -> None:
    for i in range(0, len(z), 100):
        if i // 100 < stop and not builder.has(i // 100):
            ids = [f"d{j}" for j in range(i, min(i + 100, len(z)))]
            builder.put(i // 100, ids, [f"text {one}" for one in ids], z[i : i + 100])


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_build_resumed_after_a_kill_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    z = vectors(950)
    straight = Builder(tmp_path / "a", "v", D, "model", 3, kind)  # type: ignore[arg-type]
    put_all(straight, z)
    expected = digests(straight.finish())
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import raysys.systems.rabtriever.build as build
from test_index import *
whole, wrote = build.write_chunk, []
def slow(path, chunk):
    wrote.append(path)
    if len(wrote) == 14:  # in the middle of chunk 4
        path.write_bytes(b"half")
        os.kill(os.getpid(), 9)
    whole(path, chunk)
build.write_chunk = slow
put_all(Builder({str(tmp_path / "b")!r}, "v", D, "model", 3, {kind!r}), vectors(950))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    again = Builder(tmp_path / "b", "v", D, "model", 3, kind)  # type: ignore[arg-type]
    assert [again.has(i) for i in range(6)] == [True] * 4 + [False] * 2
    put_all(again, z)
    assert digests(again.finish()) == expected


def test_chunks_of_other_documents_or_cut_otherwise_never_get_into_a_version(tmp_path: Path) -> None:
    z, a, b = vectors(4), [f"a{i}" for i in range(4)], [f"b{i}" for i in range(4)]

    def builder(ids: list[str], chunk: int = 2, version: str = "v", again: bool = False, kind: str = "flat") -> Builder:
        return Builder(tmp_path, version, D, "model", 1, kind, digest_of([chunk, *ids]), again)  # type: ignore[arg-type]

    builder(a).put(0, a[:2], a[:2], z[:2])  # and was killed
    for other in (lambda: builder(b), lambda: builder(a, chunk=3), lambda: builder(a, kind="hnsw")):
        with pytest.raises(UserError, match=r"version: got 'v'; .* holds a build of other documents, chunks") as told:
            other()
        assert "\n" not in str(told.value)
    same = builder(a)
    assert [same.has(i) for i in (0, 1)] == [True, False]
    same.put(1, a[2:], a[2:], z[2:])
    same.finish()
    assert builder(a, again=True).done
    for again, ids in ((False, a), (True, b)):
        with pytest.raises(UserError, match="has one of that name"):
            builder(ids, again=again)
    for harm in (lambda path: path.unlink(), lambda path: path.write_bytes(b"half")):
        builder(a, version="w").put(0, a, a, z)
        harm(tmp_path / "building" / "w" / "build.json")
        with pytest.raises(UserError, match="holds a build of other documents"):
            builder(a, version="w")
        remove_build(tmp_path, "w")


def test_a_bucket_is_no_folder_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for open_it in (
        lambda: Root.open("s3://b/x"),
        lambda: Root.make("s3://b/x", D, "model"),
        lambda: publish("gs://b/x", "v"),
    ):
        with pytest.raises(UserError, match=r"index: got [sg]{1,2}3?://b/x; expected a folder on a disk"):
            open_it()
    assert list(tmp_path.iterdir()) == []


def test_documents_are_dealt_to_shards_by_their_id_and_none_is_lost(tmp_path: Path) -> None:
    builder = Builder(tmp_path, "v", D, "model", 4)
    put_all(builder, vectors(950))
    builder.finish()
    publish(tmp_path, "v")
    root = Root.open(tmp_path)
    loaded = [root.load(root.current(), s) for s in range(4)]
    assert all(150 < len(one) < 350 for one in loaded)
    for i in range(950):
        assert [one.where(f"d{i}") >= 0 for one in loaded] == [shard_of(f"d{i}", 4) == s for s in range(4)]
    assert list(root.folder.glob("building/*")) == []


def test_a_build_says_what_is_wrong(tmp_path: Path) -> None:
    z = vectors(10)
    ids, builder = [f"d{i}" for i in range(10)], Builder(tmp_path, "v", D, "model", 2)
    for wrong in [(ids[:9], ids, z), (ids, ids, z[:, :5]), (ids, ids, z.astype(np.float64)), (["", *ids[1:]], ids, z)]:
        with pytest.raises(UserError, match="documents: "):
            builder.put(0, *wrong)
    with pytest.raises(UserError, match="not finite"):
        builder.put(0, ids, ids, np.full((10, D), np.inf, np.float32))
    builder.put(0, ids, ids, z)
    builder.put(2, ["x"], ["x"], z[:1])
    with pytest.raises(UserError, match="have a gap"):
        builder.finish()
    builder.put(1, ["d3"], ["again"], z[:1])
    with pytest.raises(UserError, match="the id 'd3' is there twice"):
        builder.finish()
    builder.put(1, ["y"], ["y"], z[:1])
    builder.finish()
    with pytest.raises(UserError, match="has one of that name"):
        Builder(tmp_path, "v", D, "model")
    for bad, said in [
        ({"version": "../v"}, "version: got"),
        ({"version": ".hidden"}, "version: got"),
        ({"fingerprint": "other"}, "holds vectors of the model model"),
        ({"shards": 3}, "shards: got 3"),
        ({"width": D + 1}, "of width 24 for life"),
        ({"kind": "ivf"}, "kind: got 'ivf'; expected flat or hnsw"),
        ({"root": tmp_path / "new", "shards": 0}, "shards: got 0"),
    ]:
        with pytest.raises(UserError, match=said):
            Builder(**({"root": tmp_path, "version": "w", "width": D, "fingerprint": "model"} | bad))
    Builder(tmp_path, "half", D, "model").put(0, ids, ids, z)
    remove_build(tmp_path, "half")
    assert not (tmp_path / "building" / "half").exists()


def test_only_whole_versions_of_the_root_are_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no index, build one with python -m jobs.rabtriever index"):
        Root.open(tmp_path)
    for name, fingerprint in (("a", "model"), ("b", "other")):
        builder = Builder(tmp_path / name, f"v-{name}", D, fingerprint, 2)
        put_all(builder, vectors(200))
        builder.finish()
    root = Root.open(tmp_path / "a")
    with pytest.raises(UserError, match="names no version to serve"):
        root.current()
    publish(root.folder, "v-a")
    shutil.copytree(tmp_path / "b" / "versions" / "v-b", root.folder / "versions" / "v-b")
    for name, said in [
        ("v-c", "no finished one of that name; did you mean"),
        ("../../b/versions/v-b", "version: got"),
        ("v-b", "holds vectors of the model other; expected those of model"),
    ]:
        with pytest.raises(UserError, match=said):
            publish(root.folder, name)
    assert root.current() == "v-a"
    (root.folder / "CURRENT").write_text("../../etc\n")
    with pytest.raises(UserError, match="version: got"):
        root.current()
