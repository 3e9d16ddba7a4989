"""Planning: sizes, memory and the plan of a run, and whether a machine can run it."""
