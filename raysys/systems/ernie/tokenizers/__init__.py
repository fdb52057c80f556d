"""Tokenizers for text, images and video, and audio: each trained by the project, deterministic afterwards."""
