"""Placeholder: a colleague writes this file; overwrite it."""


def explain(error, **k):
    return None
