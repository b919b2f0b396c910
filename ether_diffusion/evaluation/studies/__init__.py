"""Studies of the paper's claims on the embedded base: each a command in scripts/, a JSON file and a plot."""
