"""Nouns for humans: the schema of a run, its loader, and ready-made files.

Imports nothing of ours, and no torch.
"""
