"""From a recipe and headers to jobs, their costs, and what is refused."""
