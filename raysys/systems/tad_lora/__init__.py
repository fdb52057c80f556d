"""Decentralised LoRA with topology-aware alternation: TAD-LoRA (arXiv 2602.00451) and the methods it is compared with."""
