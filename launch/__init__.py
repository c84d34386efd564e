"""The verbs: what the command line starts. The only folder that reads configs."""
