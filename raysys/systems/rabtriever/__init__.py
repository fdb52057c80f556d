"""Rationale-based retrieval (arXiv 2604.23336): a generative reranker distilled into an exact inner-product retriever."""
