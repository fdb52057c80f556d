"""ERNIE 5.0 in small: one autoregressive ultra-sparse MoE for text, image, video and audio (arXiv 2602.04705)."""
