"""A rehearsal of the real path: a Hub on this machine with miniatures of every id, and a walk through every command."""
