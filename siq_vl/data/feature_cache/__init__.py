"""The vision features of a frozen tower, computed once and read from disk."""
