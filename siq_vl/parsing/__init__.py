"""Reading what models write: rationale, answer, arithmetic, and what can be said of a text."""
