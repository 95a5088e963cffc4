"""What is an attention in a graph, and in which module."""
