"""Looking at experts and at finished merges, and the papers' figures."""
