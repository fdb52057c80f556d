"""The peer of search_vs_fastapi.py: sentence-transformers and faiss in a FastAPI app of one screen, as one writes it by hand.

Runs in the environment of peers_st.py, without raysys:   uvicorn search_fastapi_app:app
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import faiss
import numpy as np
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

FOLDER = Path(os.environ["SEARCH_FOLDER"])
torch.set_num_threads(int(os.environ["SEARCH_THREADS"]))
faiss.omp_set_num_threads(int(os.environ["SEARCH_THREADS"]))

model = SentenceTransformer(os.environ["SEARCH_MODEL"], device="cpu")
texts = json.loads((FOLDER / "texts.json").read_text())
index = faiss.IndexFlatIP(model.get_embedding_dimension())
index.add(np.load(FOLDER / "vectors.npy"))
app = FastAPI()


class Query(BaseModel):
    query: str
    k: int = 10


@app.post("/search")
def search(query: Query) -> dict:
    u = model.encode([query.query], normalize_embeddings=True, show_progress_bar=False)
    scores, places = index.search(u, query.k)
    found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
    return {"results": [{"id": f"d{p}", "score": score, "text": texts[p]} for p, score in found]}
