"""Which token stands behind every element of every tensor of a graph: see README.md here."""
