"""Placeholder: a colleague writes this file; overwrite it."""
def shard_layers(model, mesh): raise NotImplementedError
def sum_replicated(parameters, group): raise NotImplementedError
def check_tensor(config, tp): ...
