"""What a model is asked: task files, data, heads, networks."""
