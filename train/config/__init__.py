"""The settings of a run: keys of the YAML, reading it, the model that it describes."""
