"""The settings of a run: what a YAML may hold, how it is read, which model it describes."""
