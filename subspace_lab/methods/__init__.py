"""Methods: which parameters may move in which directions.  One file per family; papers are YAML."""
