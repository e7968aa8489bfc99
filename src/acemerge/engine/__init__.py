"""Opening, streaming and computing a merge, from files or in memory."""
