"""Rationale-based retrieval: a generative reranker distilled on-policy into an exact inner-product retriever (arXiv 2604.23336)."""
