"""What kind of experiment a run is; each protocol's `run` takes a configuration and a folder and returns an Outcome."""
