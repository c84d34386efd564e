"""An ordinary nn.Module made parallel; the model does not know."""
