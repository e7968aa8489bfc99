"""What a model is: architecture, roles, projections, tied heads, vocabulary."""
