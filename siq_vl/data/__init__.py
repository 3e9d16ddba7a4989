"""Training data: sources, filters, mixtures, collation, and the drawn figures."""
